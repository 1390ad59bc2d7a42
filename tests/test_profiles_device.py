"""Device profiles: the built-in ones are sound, a user's own are checked and kept."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from profiles import device
from profiles.device import (
    FIGURES,
    Figure,
    format_profile,
    import_profile,
    load_profile,
    profile_names,
    read_profile,
)
from profiles.errors import ProfileError

BUILT_IN = profile_names(folder=Path("no-such-folder"))


def own_profile(folder: Path, *, name: str = "kitchen-pi", **replaced: str) -> Path:
    """Write pi-4-2gb under another name, with some lines replaced."""
    text = format_profile(load_profile("pi-4-2gb"))
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_board_of_the_project_has_a_profile():
    """The boards that the project is written for are all there, each RAM size under its own name."""
    pi = [
        "pi-zero-2w",
        "pi-3b-plus",
        *[f"pi-4-{n}gb" for n in (1, 2, 4, 8)],
        *[f"pi-5-{n}gb" for n in (2, 4, 8, 16)],
    ]
    jetson = ["nano", "xavier-nx-8gb", "xavier-nx-16gb", "orin-nano", "orin-nano-super", "orin-nx-8gb"]
    jetson += ["orin-nx-16gb", "agx-orin-32gb", "agx-orin-64gb"]

    assert sorted([*pi, *[f"jetson-{j}" for j in jetson], "generic-x86-64", "generic-arm64"]) == sorted(
        BUILT_IN
    )


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_figures_follow_their_stated_rules(name):
    """Each default budget is the rule that its source states, and no figure lacks a source."""
    profile = load_profile(name)

    assert profile.memory_mib.value == (profile.ram_mib.value - 256) // 2
    assert all(getattr(profile, key).source for key in FIGURES)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_estimated_peak_is_cores_times_clock_times_width(name):
    """An estimated GFLOP/s is cores x GHz x 8 or 16; the Xavier runs its six cores at 1.4 GHz, not 1.9."""
    profile = load_profile(name)
    clock = 1.4 if "xavier" in name else profile.clock_ghz.value
    width = profile.fp32_gflops.value / (profile.cores.value * clock)

    assert profile.fp32_gflops.kind == "estimate"
    assert round(width, 2) in (8, 16)


def test_names_are_sorted_as_people_count():
    """2gb comes before 16gb, and a name that begins with a digit does not break the order."""
    names = profile_names()

    assert names.index("pi-5-2gb") < names.index("pi-5-8gb") < names.index("pi-5-16gb")
    assert sorted(["4b", "a"], key=device._natural) == ["4b", "a"]


def test_an_unknown_name_names_the_nearest():
    """`pi-zero2w` is answered with `pi-zero-2w`."""
    with pytest.raises(ProfileError, match="`pi-zero2w`") as caught:
        load_profile("pi-zero2w")

    assert "Did you mean `pi-zero-2w`?" in caught.value.hint
    assert "profile list" in caught.value.hint


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_profile_survives_being_written_and_read(name, tmp_path):
    """format_profile and read_profile are inverses."""
    path = tmp_path / f"{name}.toml"
    path.write_text(format_profile(load_profile(name)), encoding="utf-8")

    assert read_profile(path) == load_profile(name)


def test_odd_characters_survive_being_written_and_read(tmp_path):
    """Quotes, newlines, umlauts and control characters in a text come back as they were."""
    odd = dataclasses.replace(
        load_profile("pi-4-2gb"), name="odd", note='a "b"\\ \n\t\x7f\x01 Küche \U0001f353'
    )
    path = tmp_path / "odd.toml"
    path.write_text(format_profile(odd), encoding="utf-8")

    assert read_profile(path) == odd


def test_an_imported_profile_is_found_by_its_name(tmp_path):
    """import_profile keeps a copy that load_profile and profile_names see."""
    folder = tmp_path / "kept"
    profile = import_profile(own_profile(tmp_path), folder=folder)

    assert load_profile("kitchen-pi", folder=folder) == profile
    assert "kitchen-pi" in profile_names(folder=folder)
    assert [path.name for path in folder.iterdir()] == ["kitchen-pi.toml"]


def test_the_users_folder_follows_the_platform(monkeypatch, tmp_path):
    """Without an argument, profiles are kept in the configuration folder of the user."""
    monkeypatch.setenv("APPDATA" if sys.platform == "win32" else "XDG_CONFIG_HOME", str(tmp_path))
    import_profile(own_profile(tmp_path))

    assert (tmp_path / "scalarfed" / "devices" / "kitchen-pi.toml").exists()
    assert load_profile("kitchen-pi").title == load_profile("pi-4-2gb").title


def test_a_built_in_name_cannot_be_taken(tmp_path):
    """A user's profile cannot change what `pi-4-2gb` means."""
    with pytest.raises(ProfileError, match="built-in"):
        import_profile(own_profile(tmp_path, name="pi-4-2gb"), folder=tmp_path / "kept")

    assert not (tmp_path / "kept").exists()


def test_like_fills_in_what_is_left_out(tmp_path):
    """Two lines suffice for a board that is another one with another budget."""
    path = tmp_path / "busy-pi.toml"
    figure = '{ value = 300, kind = "measured", source = "free -m", date = 2026-11-21 }'
    path.write_text(f'like = "pi-4-2gb"\nmemory_mib = {figure}\n', encoding="utf-8")
    profile, base = read_profile(path), load_profile("pi-4-2gb")

    assert profile.memory_mib == Figure(300, "free -m", "measured", "2026-11-21")
    assert dataclasses.replace(profile, name=base.name, memory_mib=base.memory_mib) == base


def test_like_in_a_circle_is_refused(tmp_path):
    """Two profiles that lean on each other are an error, not an endless loop."""
    (tmp_path / "a.toml").write_text('like = "b"\n', encoding="utf-8")
    (tmp_path / "b.toml").write_text('like = "a"\n', encoding="utf-8")

    with pytest.raises(ProfileError, match="back to itself"):
        load_profile("a", folder=tmp_path)


def test_all_faults_are_told_at_once(tmp_path):
    """Five faults in one file make one error with five lines, a misspelt key among them."""
    path = own_profile(
        tmp_path,
        **{
            "[bandwidth_gbs]": "[bandwith_gbs]",
            "value = 896": "value = 4096",
            'arch = "aarch64"': 'arch = "sparc"',
            "value = 1.5": "value = nan",
        },
    )
    with pytest.raises(ProfileError, match="has 5 faults") as caught:
        read_profile(path)
    told = str(caught.value)

    assert "did you mean `bandwidth_gbs`?" in told
    assert "`bandwidth_gbs` must be a table" in told
    assert "`memory_mib` is 4096, more than the board's `ram_mib` of 2048" in told
    assert "'sparc'" in told
    assert "`clock_ghz.value` must lie in" in told


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("value = 4\n", "value = 3.5\n", "`cores` must be a whole number"),
        ("value = 4\n", "value = true\n", "`cores.value` must be a number"),
        ('kind = "estimate"', 'kind = "guess"', "must be measured or estimate"),
        ('date = "2026-11-21"', 'date = "yesterday"', "must be a date"),
        ('date = "2026-11-21"', "date = 7", "must be a date"),
        ('source = "maker', 'sauce = "maker', "`ram_mib.sauce` is not known"),
        ('python = ["3.11", "3.13"]', 'python = ["4"]', "'4' is no version"),
        ('flash = ["card", "image", "ssh"]', 'flash = ["usb"]', "'usb' is none of card"),
        ('flash = ["card", "image", "ssh"]', 'flash = "ssh"', "`flash` must be a list"),
        ("title = ", "title = 3 # ", "`title` must be a text"),
    ],
)
def test_a_bad_value_is_named_with_its_rule(old, new, told, tmp_path):
    """Each rule of the format is enforced, and the message names the key."""
    with pytest.raises(ProfileError) as caught:
        read_profile(own_profile(tmp_path, **{old: new}))

    assert told in str(caught.value)


@pytest.mark.parametrize(("content", "told"), [(b"[[[", "not a TOML file"), (b"\xff", "not a TOML file")])
def test_what_is_not_toml_is_said_so(content, told, tmp_path):
    """Broken syntax and bytes that are no text name the file."""
    path = tmp_path / "broken.toml"
    path.write_bytes(content)

    with pytest.raises(ProfileError, match=told):
        read_profile(path)


def test_a_missing_file_is_said_so(tmp_path):
    """A path that does not exist is a ProfileError with the path."""
    with pytest.raises(ProfileError, match="absent"):
        import_profile(tmp_path / "absent.toml", folder=tmp_path)


def test_a_faulty_profile_is_not_kept(tmp_path):
    """Nothing is written when the file has faults."""
    with pytest.raises(ProfileError):
        import_profile(own_profile(tmp_path, **{"value = 4\n": "value = 0\n"}), folder=tmp_path / "kept")

    assert not (tmp_path / "kept").exists()


def test_importing_the_module_needs_no_toml_reader():
    """A board without tomllib and tomli can import it; only reading a profile asks for one."""
    script = (
        "import sys; sys.modules['tomllib'] = sys.modules['tomli'] = None\n"
        "from profiles.device import load_profile, profile_names\n"
        "from profiles.errors import ProfileError\n"
        "assert profile_names()\n"
        "try: load_profile('pi-4-2gb')\n"
        "except ProfileError as error: print(error.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert "pip install tomli" in done.stdout
