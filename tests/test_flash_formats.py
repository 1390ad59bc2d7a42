"""First-boot formats: found by evidence, merged line by line, refused when unsure; cloud-init has its say."""

import shutil
import subprocess

import pytest

from coordinator.flash.formats import detect, merge, texts_of
from coordinator.flash.settings import Wifi, check_address, check_names, expand_names
from coordinator.flash.volume import FolderVolume
from profiles.errors import FlashError
from tests.card_images import BOOKWORM, RPI_CMDLINE, TRIXIE

INSTALL = (
    "for d in /boot/firmware /boot; do "
    "test -f $d/scalarfed/install.sh && sh $d/scalarfed/install.sh && break; done"
)
RUN = (
    "systemd.run=/boot/firstrun.sh systemd.run_success_action=reboot systemd.unit=kernel-command-line.target"
)

IMAGER_FIRSTRUN = """\
#!/bin/bash

set +e

CURRENT_HOSTNAME=`cat /etc/hostname | tr -d " \\t\\n\\r"`
/usr/lib/raspberrypi-sys-mods/imager_custom set_hostname kitchen
rm -f /boot/firstrun.sh
sed -i 's| systemd.run.*||g' /boot/cmdline.txt
exit 0
"""
IMAGER_USER_DATA = """\
#cloud-config
hostname: kitchen
manage_etc_hosts: true
users:
- name: pi
  groups: users,adm
runcmd:
- [ sh, -c, 'raspi-config nonint do_ssh 0' ]
# a comment of mine
timezone: Europe/Berlin
"""


def card(folder, files):
    """Return a mounted card with these files."""
    for name, data in files.items():
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return FolderVolume(folder)


def found(folder, files, **options):
    volume = card(folder, files)
    return detect(volume, texts_of(volume), **options)


# ------------------------------------------------------------------------------------------- detection


@pytest.mark.parametrize(
    ("files", "format_", "python", "booted"),
    [
        (BOOKWORM, "systemd", "3.11", False),
        (BOOKWORM | {"firstrun.sh": IMAGER_FIRSTRUN}, "systemd", "3.11", False),
        (BOOKWORM | {"cmdline.txt": "root=PARTUUID=1-02 rootwait\n"}, "systemd", "3.11", True),
        (TRIXIE, "cloud-init", "3.13", False),
        (
            {"cmdline.txt": "root=x\n", "user-data": "#cloud-config\n", "meta-data": ""},
            "cloud-init",
            "",
            False,
        ),
    ],
    ids=["Bookworm", "Bookworm after Imager", "Bookworm booted", "Trixie", "Ubuntu or Debian"],
)
def test_a_format_is_found_by_evidence(tmp_path, files, format_, python, booted):
    """Each maker's fresh card is known, with its Python, and says why."""
    first = found(tmp_path, files)

    assert (first.format, first.python, first.booted) == (format_, python, booted)
    assert first.evidence


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"photo.jpg": b""}, "neither cmdline.txt nor user-data"),
        ({"cmdline.txt": "root=x\n"}, "neither cloud-init nor Imager's firstrun.sh"),
        (TRIXIE | {"firstrun.sh": IMAGER_FIRSTRUN}, "both cloud-init's and systemd's"),
        (BOOKWORM | {"kernel7.img": b""}, "32-bit"),
        (BOOKWORM | {"issue.txt": "Raspberry Pi reference 2022-09-22\n"}, "before Bookworm"),
        (BOOKWORM | {"rpi-preseed.toml": ""}, "not settled"),
    ],
    ids=["a camera's card", "no evidence", "both", "32-bit", "Bullseye", "preseed"],
)
def test_thin_evidence_is_refused_with_the_next_step(tmp_path, files, says):
    """What is unknown, contradictory, 32-bit or too old is refused, and a hint names what to do."""
    with pytest.raises(FlashError, match=says) as refused:
        found(tmp_path, files)

    assert len(refused.value.hint) > 20


def test_a_person_may_know_better(tmp_path):
    """--format settles contradictory evidence."""
    assert found(tmp_path, TRIXIE | {"firstrun.sh": IMAGER_FIRSTRUN}, forced="systemd").format == "systemd"


# --------------------------------------------------------------------------------------- golden merges


def test_systemd_on_a_card_without_settings():
    """A script of our own, and one line of cmdline.txt that runs it once; byte for byte."""
    merged = merge({"cmdline.txt": RPI_CMDLINE}, "systemd", name="pi-1", instance="i")

    assert list(merged) == ["firstrun.sh", "cmdline.txt"]
    assert merged["cmdline.txt"] == f"{RPI_CMDLINE.strip()} cgroup_enable=memory {RUN}\n"
    assert merged["firstrun.sh"] == (
        "#!/bin/sh\nset +e\nraspi-config nonint do_hostname pi-1 || echo pi-1 >/etc/hostname\n"
        f"# scalarfed: install the agent from this partition\n{INSTALL} || true\n"
        "rm -f /boot/firstrun.sh /boot/firmware/firstrun.sh\n"
        "test -f /boot/firmware/cmdline.txt && sed -i 's| systemd.run.*||g' /boot/firmware/cmdline.txt\n"
        "test -f /boot/cmdline.txt && sed -i 's| systemd.run.*||g' /boot/cmdline.txt\nexit 0\n"
    )


def test_systemd_keeps_what_imager_wrote():
    """Imager's script keeps every line and its ending; ours stand before it removes itself."""
    cmdline = f"{RPI_CMDLINE.strip()} {RUN}\n"
    merged = merge(
        {"cmdline.txt": cmdline, "firstrun.sh": IMAGER_FIRSTRUN}, "systemd", name="x", instance="i"
    )

    ours = f"# scalarfed: install the agent from this partition\n{INSTALL} || true\n"
    before, after = IMAGER_FIRSTRUN.split("rm -f /boot/firstrun.sh")
    assert merged["firstrun.sh"] == f"{before}{ours}rm -f /boot/firstrun.sh{after}"
    assert merged["cmdline.txt"] == f"{RPI_CMDLINE.strip()} cgroup_enable=memory {RUN}\n"


def test_the_memory_cgroup_outlives_imagers_cut():
    """Imager's own sed removes what follows `systemd.run`; the memory cgroup must stand before it."""
    merged = merge({"cmdline.txt": RPI_CMDLINE}, "systemd", name="x", instance="i")
    cut = subprocess.run(
        ["sed", "s| systemd.run.*||g"],
        input=merged["cmdline.txt"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    assert cut == f"{RPI_CMDLINE.strip()} cgroup_enable=memory\n"


def test_the_script_runs_and_cleans_up(tmp_path):
    """A real shell calls the installer by it, and it removes itself; it ends well even if that fails."""
    script = merge({"cmdline.txt": RPI_CMDLINE}, "systemd", name="x", instance="i")["firstrun.sh"]
    boot = tmp_path / "boot"
    (boot / "scalarfed").mkdir(parents=True)
    (boot / "scalarfed/install.sh").write_text(f"touch {tmp_path}/installed; exit 1\n")
    (boot / "firstrun.sh").write_text(script)
    (boot / "cmdline.txt").write_text(f"root=x {RUN}\n")
    moved = script.replace("/boot/firmware", str(boot)).replace("/etc/hostname", str(tmp_path / "hostname"))
    done = subprocess.run(["sh", "-c", moved.replace(" /boot", f" {boot}")], capture_output=True, check=False)

    assert done.returncode == 0
    assert (tmp_path / "installed").exists()
    assert not (boot / "firstrun.sh").exists()
    assert (boot / "cmdline.txt").read_text() == "root=x\n"


def test_cloud_init_on_a_fresh_card():
    """Trixie's and Ubuntu's files get a new instance, our command and the kernel's words; byte for byte."""
    texts = {
        name: TRIXIE[name].decode() for name in ("cmdline.txt", "user-data", "meta-data", "network-config")
    }
    merged = merge(texts, "cloud-init", name="pi-1", instance="scalarfed-1")

    assert list(merged) == ["meta-data", "user-data", "cmdline.txt"]
    assert merged["meta-data"] == "dsmode: local\ninstance-id: scalarfed-1\n"
    assert merged["user-data"] == (
        "#cloud-config\n# Raspberry Pi Imager or you write here.\nhostname: pi-1\n"
        f'# scalarfed: install the agent from this partition\nruncmd:\n  - [sh, -c, "{INSTALL}"]\n'
    )
    assert merged["cmdline.txt"] == (
        "console=tty1 root=PARTUUID=4e639091-02 rootfstype=ext4 rootwait resize cgroup_enable=memory "
        "ds=nocloud;i=scalarfed-1\n"
    )


def test_cloud_init_keeps_what_imager_wrote():
    """Every line of Imager's stays in its place; our command is the last of its list."""
    merged = merge({"user-data": IMAGER_USER_DATA}, "cloud-init", name="other", instance="i")["user-data"]

    item = f'- [sh, -c, "{INSTALL}"]\n'
    imager = "- [ sh, -c, 'raspi-config nonint do_ssh 0' ]\n"
    assert merged == IMAGER_USER_DATA.replace(imager, imager + item)


def test_another_flashing_is_another_instance():
    """Imager's instance on the kernel's command line gives way, so that first boot runs again."""
    texts = {"cmdline.txt": "root=x ds=nocloud;i=rpi-imager-17\n", "user-data": ""}

    assert merge(texts, "cloud-init", name="x", instance="new")["cmdline.txt"] == (
        "root=x cgroup_enable=memory ds=nocloud;i=new\n"
    )


WIFI = Wifi.of("home & garden", "correct horse", "de")
FLAVOURS = {
    "fresh": {"user-data": ""},
    "Trixie": {"user-data": TRIXIE["user-data"].decode()},
    "Imager": {"user-data": IMAGER_USER_DATA},
}


@pytest.mark.skipif(shutil.which("cloud-init") is None, reason="cloud-init is not installed")
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_cloud_init_itself_takes_it(tmp_path, flavour):
    """`cloud-init schema` finds the merged user-data valid."""
    path = tmp_path / "user-data"
    path.write_text(merge(FLAVOURS[flavour], "cloud-init", name="pi-1", instance="i")["user-data"])
    done = subprocess.run(
        ["cloud-init", "schema", "--config-file", str(path)], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_merged_list_is_one_list():
    """A YAML reader sees Imager's command and ours, in this order, as the one value of runcmd."""
    yaml = pytest.importorskip("yaml")
    for texts in FLAVOURS.values():
        merged = yaml.safe_load(merge(texts, "cloud-init", name="pi-1", instance="i")["user-data"])
        assert merged["runcmd"][-1] == ["sh", "-c", INSTALL]
    assert len(merged["runcmd"]) == 2
    assert merged["timezone"] == "Europe/Berlin"


@pytest.mark.parametrize(
    ("texts", "format_", "says"),
    [
        ({"cmdline.txt": "root=x\nquiet\n"}, "systemd", "2 lines"),
        ({"cmdline.txt": "\n"}, "systemd", "missing or empty"),
        ({"cmdline.txt": "root=x systemd.run=/other\n"}, "systemd", "something else"),
        ({"cmdline.txt": "root=x\n", "firstrun.sh": "#!/bin/sh\nreboot\n"}, "systemd", "no safe place"),
        ({"cmdline.txt": "root=x\n", "firstrun.sh": "#!/bin/sh\r\n"}, "systemd", "line endings"),
        ({"user-data": "#!/bin/sh\n"}, "cloud-init", "#cloud-config only"),
        ({"user-data": "#cloud-config\nruncmd: [ls]\n"}, "cloud-init", "on one line"),
        ({"cmdline.txt": "a\nb\n", "user-data": ""}, "cloud-init", "2 lines"),
    ],
)
def test_what_cannot_be_merged_is_refused(texts, format_, says):
    """A file into which nothing can be merged safely is refused, with the next step."""
    with pytest.raises(FlashError, match=says) as refused:
        merge(texts, format_, name="x", instance="i")
    assert len(refused.value.hint) > 20


# ------------------------------------------------------------------------------------------------ Wi-Fi


def test_the_wifi_key_is_the_standards():
    """The key is that of IEEE 802.11i, annex H.4, first test vector; the password is not kept."""
    wifi = Wifi.of("IEEE", "password", "us")

    assert wifi.key == "f42c6fc52df0ebef9ebb4b90b38a5f902e83fe1b135a70e23aed762e9710a12e"
    assert "password" not in repr(wifi)


def test_wifi_in_both_formats():
    """The network comes into the script quoted, and into netplan as a YAML reader sees it."""
    script = merge({"cmdline.txt": "root=x\n"}, "systemd", name="x", instance="i", wifi=WIFI)["firstrun.sh"]
    netplan = merge({"user-data": ""}, "cloud-init", name="x", instance="i", wifi=WIFI)["network-config"]

    assert f"imager_custom set_wlan 'home & garden' '{WIFI.key}' 'DE'" in script
    wlan = pytest.importorskip("yaml").safe_load(netplan)["network"]["wifis"]["wlan0"]
    assert wlan["access-points"] == {"home & garden": {"password": WIFI.key}}
    assert wlan["regulatory-domain"] == "DE"


@pytest.mark.parametrize(
    ("ssid", "password", "country", "says"),
    [
        ("", "12345678", "DE", "0 bytes"),
        ("a", "1234567", "DE", "7 characters"),
        ("a", "12345678", "", "country"),
    ],
)
def test_wifi_that_cannot_work_is_refused(ssid, password, country, says):
    """A missing name, a short password and a missing country are named before a card is written."""
    with pytest.raises(FlashError, match=says):
        Wifi.of(ssid, password, country)


def test_wifi_of_imager_is_not_overwritten():
    """Where Imager set a network up, another one is refused."""
    texts = {"user-data": "", "network-config": "network:\n  version: 2\n"}
    with pytest.raises(FlashError, match="already"):
        merge(texts, "cloud-init", name="x", instance="i", wifi=WIFI)


# ------------------------------------------------------------------------------------ names and addresses


def test_names_count():
    """A range keeps its zeros; a name alone is itself."""
    assert expand_names("pi-{01..08}") == [f"pi-0{n}" for n in range(1, 9)]
    assert expand_names("kitchen") == ["kitchen"]


@pytest.mark.parametrize(
    "name", ["", "Pi", "pi_1", "-pi", "pi-", "a" * 64, "pi 1", "pi-{8..1}", "pi-{1..2000}"]
)
def test_names_that_no_host_can_have_are_refused(name):
    """What DNS or MQTT could not carry is refused."""
    with pytest.raises(FlashError):
        expand_names(name)


def test_a_name_in_use_is_refused():
    """Two boards cannot have one name; the hint says how to replace one."""
    with pytest.raises(FlashError, match="in use") as refused:
        check_names(["a", "b"], ["b"])
    assert "--replace b" in refused.value.hint


@pytest.mark.parametrize(
    "broker",
    [
        "mqtt://127.0.0.1:1883",
        "mqtt://localhost",
        "mqtts://[::1]:8883",
        "mqtt://0.0.0.0",
        "laptop:1883",
        "mqtt://",
    ],
)
def test_an_address_that_no_board_reaches_is_refused(broker):
    """Loopback in each of its forms, and what is no address, never get onto a card."""
    with pytest.raises(FlashError):
        check_address(broker)


def test_addresses_that_boards_reach():
    """Names and addresses in a network are fine."""
    for broker in ("mqtt://192.168.1.5", "mqtt://laptop.local:1883", "mqtts://[fd00::1]:8883"):
        check_address(broker)
