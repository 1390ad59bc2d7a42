#!/bin/sh
# Runs as root when the agent asks for what only root may do. The agent is believed in nothing: an update is
# checked by the installed release before any of it is run, a light blinks for a minute at most, and whatever
# else lies in the folder of requests is removed.
#
#   care.sh [ROOT]
set -u
root=${1:-} leds=${2:-/sys/class/leds}
opt=$root/opt/scalarfed var=$root/var/lib/scalarfed asks=$root/var/lib/scalarfed/asks

report=$opt/report.txt
for place in "$root/boot/firmware" "$root/boot"; do
  [ -f "$place/scalarfed/report.txt" ] && report=$place/scalarfed/report.txt && break
done

outcome() { # outcome STATE WORDS
  echo "$1 $(cat "$opt/update.number" 2>/dev/null || echo 0) $2" >"$opt/update.outcome.new"
  mv -f "$opt/update.outcome.new" "$opt/update.outcome"
  echo "scalarfed: update $1: $2"
  # A card wears out by writing: offers that are refused for ever say so for a while only.
  [ "$(wc -c <"$report" 2>/dev/null || echo 0)" -ge 32768 ] ||
    echo "$(cut -d' ' -f1 /proc/uptime) update $1: $2" >>"$report"
}

if [ -e "$asks/update" ]; then
  python=$opt/current/venv/bin/python
  sh "$opt/guard.sh" joined "$root" # a release that has joined is no longer on trial
  if [ -f "$opt/trial" ]; then
    : # the agent waits for a trial to end; whoever does not is not heard
  elif said=$("$python" -I -m edge_agent.update "$var" "$opt" "$root/etc/scalarfed/board.json" 2>&1); then
    # The same words as at a first boot go into the same report. The agent is started anew by the installer.
    if SCALARFED_REPORT=$report sh "$opt/incoming/install.sh" ${root:+--root "$root"} ${root:+--no-start}; then
      rm -rf "$opt/payload"
      mv "$opt/incoming" "$opt/payload" # the next update fetches only what differs
      outcome trial "$said is installed, on trial"
    else
      outcome failed "$said did not install: $(grep FAILED "$report" | tail -n 1 | cut -d' ' -f2-)"
    fi
    rm -rf "$var/update"
  else
    outcome refused "$(echo "$said" | tail -n 1)"
    rm -rf "$var/update"
  fi
  rm -rf "$asks/update"
fi

if [ -f "$asks/locate" ]; then
  seconds=$(head -c 3 "$asks/locate" | tr -cd 0-9)
  rm -rf "$asks/locate"
  for led in ACT led0 mmc0:: mmc0 PWR led1 $(ls "$leds" 2>/dev/null | grep -v ::); do
    [ -f "$leds/$led/brightness" ] || continue
    before=$(sed 's/.*\[\(.*\)\].*/\1/' "$leds/$led/trigger" 2>/dev/null)
    most=$(cat "$leds/$led/max_brightness" 2>/dev/null || echo 1)
    echo none >"$leds/$led/trigger" 2>/dev/null
    n=0
    while [ $n -lt "${seconds:-10}" ] && [ $n -lt 60 ]; do
      echo "$most" >"$leds/$led/brightness"; sleep 0.5
      echo 0 >"$leds/$led/brightness"; sleep 0.5
      n=$((n + 1))
    done
    echo "${before:-none}" >"$leds/$led/trigger" 2>/dev/null
    break
  done
fi

rm -rf "${asks:?}"/* "${asks:?}"/.[!.]* 2>/dev/null
exit 0
