#!/bin/sh
# Installs the scalarfed agent from the folder in which this file lies. Needs no network: it is run by a
# board's first boot, or over SSH. Every step is appended to report.txt beside it, so that a board that
# never reported in is understood from its card. Running it again repairs or updates.
#
#   install.sh [--root DIR] [--no-start]    DIR: another root than /, for tests
set -eu

root='' start=yes
while [ $# -gt 0 ]; do
  case $1 in
    --root) root=$2; shift 2 ;;
    --no-start) start=no; shift ;;
    *) echo "install.sh: unknown option $1" >&2; exit 2 ;;
  esac
done

here=$(cd "$(dirname "$0")" && pwd)
report=${SCALARFED_REPORT:-$here/report.txt}
opt=$root/opt/scalarfed etc=$root/etc/scalarfed var=$root/var/lib/scalarfed
lock=$root/run/scalarfed-install.lock

say() {
  echo "scalarfed: $*"
  echo "$(cut -d' ' -f1 /proc/uptime 2>/dev/null || echo 0) $*" >>"$report"
  if [ -w /dev/kmsg ] && [ -z "$root" ]; then echo "scalarfed: $*" >/dev/kmsg || true; fi
}

fail() {
  say "FAILED: $*"
  exit 1
}

# One installer at a time. The lock names its owner, so that one that died does not lock for ever.
mkdir -p "$root/run"
if ! mkdir "$lock" 2>/dev/null; then
  owner=$(cat "$lock/pid" 2>/dev/null || echo)
  if [ -n "$owner" ] && kill -0 "$owner" 2>/dev/null; then
    echo "scalarfed: another installer runs already, process $owner" >&2
    exit 75
  fi
  rm -rf "$lock"
  mkdir "$lock" || exit 75
fi
echo $$ >"$lock/pid"
leave() {
  status=$?
  rm -rf "$lock"
  [ $status -eq 0 ] || say "ended with status $status"
  sync
}
trap leave EXIT
trap 'exit 143' TERM INT

read -r release arch python <"$here/release"
say "begin $release"

# --- what this machine is
machine=$(uname -m)
[ "$machine" = "$arch" ] || fail "machine: this is $machine, the wheels are for $arch"
command -v python3 >/dev/null || fail "python: there is no python3"
found=$(python3 -c 'import sys, struct; print("%d.%d %d" % (*sys.version_info[:2], 8 * struct.calcsize("P")))')
[ "$found" = "$python 64" ] || fail "python: this is ${found% *} with ${found#* } bits, the wheels are for $python with 64"
say "machine: $machine, Python $python"

# --- what was brought
cd "$here"
sha256sum --status -c MANIFEST 2>/dev/null || fail "hash: $(sha256sum -c MANIFEST 2>/dev/null | grep -v ': OK$' | head -n 3 | tr '\n' ' ')"
say "hashes: all as in MANIFEST"
need=$(($(cat unpacked_kib) + 16384))
mkdir -p "$opt/releases" "$etc" "$var"
free=$(df -Pk "$opt" | awk 'NR == 2 {print $4}')
[ "$free" -ge "$need" ] || fail "space: $free KiB are free, $need KiB are needed"

# --- who it runs as
if [ -z "$root" ]; then
  id scalarfed >/dev/null 2>&1 || useradd --system --home-dir /var/lib/scalarfed --shell /usr/sbin/nologin scalarfed
  owner=scalarfed
else
  owner=$(id -un)
fi
group=$(id -gn "$owner")

# --- the release: whole or not there at all
if [ ! -f "$opt/releases/$release/complete" ]; then
  rm -rf "$opt/releases/$release"
  say "environment"
  python3 -m venv --without-pip "$opt/releases/$release/venv"
  site=$("$opt/releases/$release/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  for wheel in wheels/*.whl; do
    python3 -m zipfile -e "$wheel" "$site" || fail "wheels: $wheel does not unpack"
  done
  say "wheels: $(find wheels -name '*.whl' | wc -l) unpacked"
  cp release "$opt/releases/$release/"
  # Imports everything once: a wrong architecture shows here, and the next start finds compiled modules.
  "$opt/releases/$release/venv/bin/python" -c 'import edge_agent.service' 2>"$var/import.log" ||
    fail "import: $(tail -n 1 "$var/import.log")"
  say "import: fine"
  : >"$opt/releases/$release/complete"
fi

# --- what the board can do, measured once, while nothing of ours runs yet
if [ ! -f "$var/measured.json" ]; then
  "$opt/releases/$release/venv/bin/python" -I -m profiles.selftest "$var/measured.json" "${SCALARFED_MEASURE_S:-5}" \
    2>/dev/null || rm -f "$var/measured.json"
  say "measured: $(cat "$var/measured.json" 2>/dev/null || echo nothing)"
fi

# --- the board's own: settings, bundle, samples; an update keeps the former ones until it is well
former=$(readlink "$opt/current" 2>/dev/null || echo)
changed=no
install -m 755 guard.sh "$opt/guard.sh"
install -m 755 care.sh "$opt/care.sh"
settings() {
  chgrp "$group" "$etc/board.json.new" 2>/dev/null || true
  chmod 640 "$etc/board.json.new"
  mv -f "$etc/board.json.new" "$etc/board.json"
}
if [ -f board.json ]; then
  # The ticket is a secret that the agent uses up; the settings are root's, and the agent may read them.
  (umask 077 && mkdir -p "$var/security" && python3 -c 'import json, sys
told = json.load(open("board.json"))
ticket = told.pop("ticket", None)
open(sys.argv[1], "w").write(json.dumps(told, indent=1))
if ticket:
    open(sys.argv[2], "w").write(json.dumps(ticket))' "$etc/board.json.new" "$var/security/ticket.json") ||
    fail "settings: board.json cannot be read"
  settings
fi
[ -f "$etc/board.json" ] || fail "settings: board.json is neither here nor in $etc"
if [ -f settings.json ]; then
  (umask 077 && python3 -c 'import json, sys; print(json.dumps(json.load(open(sys.argv[1])) | json.load(open(sys.argv[2])), indent=1))' \
    "$etc/board.json" settings.json >"$etc/board.json.new") || fail "settings: settings.json cannot be merged"
  if ! cmp -s "$etc/board.json" "$etc/board.json.new"; then
    [ -f "$etc/board.json.former" ] || cp -p "$etc/board.json" "$etc/board.json.former"
    changed=yes
  fi
  settings
fi
for what in bundle data.npz; do
  [ -e "$what" ] || continue
  if [ "$what" = bundle ] && [ -n "$former" ] && ! cmp -s bundle/manifest.json "$var/bundle/manifest.json"; then
    [ -d "$var/bundle.former" ] || cp -R "$var/bundle" "$var/bundle.former"
    changed=yes
  fi
  rm -rf "$var/$what.new"
  cp -R "$what" "$var/$what.new"
  rm -rf "${var:?}/$what"
  mv "$var/$what.new" "$var/$what"
done
mkdir -p "$var/asks"
[ -n "$root" ] || chown -R scalarfed: "$var"
say "settings: in place"

# --- the switch; a former release stays, and guard.sh goes back to it if this one does not get well
if [ "$former" != "releases/$release" ] || [ $changed = yes ]; then
  if [ -n "$former" ] && [ ! -f "$opt/trial" ]; then
    echo "$former" >"$opt/trial.new"
    mv -f "$opt/trial.new" "$opt/trial"
  fi
  rm -f "$opt/trial.starts" "$var/healthy" "$var/give-back"
  ln -sfn "releases/$release" "$opt/current.new"
  mv -fT "$opt/current.new" "$opt/current"
fi
say "release: current is $release${former:+, before it ${former#releases/}}"

# --- the service
mkdir -p "$root/etc/systemd/system"
budget=$(python3 -c 'import json, sys; print(round(json.load(open(sys.argv[1]))["memory_mib"]))' "$etc/board.json") ||
  fail "settings: $etc/board.json has no memory_mib"
for unit in scalarfed-agent.service scalarfed-care.service scalarfed-care.path; do
  sed "s/@MEMORY_MIB@/$budget/" $unit >"$root/etc/systemd/system/$unit.new"
  chmod 644 "$root/etc/systemd/system/$unit.new"
  mv -f "$root/etc/systemd/system/$unit.new" "$root/etc/systemd/system/$unit"
done
if [ $start = yes ] && command -v systemctl >/dev/null && [ -z "$root" ]; then
  systemctl daemon-reload
  systemctl enable scalarfed-agent.service scalarfed-care.path 2>/dev/null
  systemctl start --no-block scalarfed-care.path
  # At first boot the unit may be part of a transaction that waits for us: do not wait for it.
  systemctl restart --no-block scalarfed-agent.service || fail "service: systemd did not take it"
  say "service: enabled and started"
else
  say "service: written"
fi
grep -qw memory "$root/sys/fs/cgroup/cgroup.controllers" 2>/dev/null || grep -qw memory /sys/fs/cgroup/cgroup.controllers 2>/dev/null ||
  say "warning: no memory cgroup until the next boot; cmdline.txt needs cgroup_enable=memory"

# --- FAT has no permissions: the token must not stay here
if [ -f board.json ]; then
  dd if=/dev/zero of=board.json bs="$(wc -c <board.json)" count=1 conv=notrunc 2>/dev/null
  sync
  rm -f board.json
  grep -v '  board.json$' MANIFEST >MANIFEST.new && mv -f MANIFEST.new MANIFEST
  say "token: erased from here"
fi
say "done $release"
