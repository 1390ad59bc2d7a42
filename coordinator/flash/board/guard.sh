#!/bin/sh
# Runs as root around each life of the agent.
#
# Before a start: while a new release is on trial, goes back to the former one when the new one has been
# started four times, or gives up, without having joined its run. After an end that was none of its own will:
# appends how it ended to the report on the boot partition, where `scalarfed doctor CARD` finds it.
#
#   guard.sh before|after|joined [ROOT]    joined: only end a trial that went well
set -u
root=${2:-}
opt=$root/opt/scalarfed var=$root/var/lib/scalarfed etc=$root/etc/scalarfed

note() {
  report=$opt/report.txt
  for place in "$root/boot/firmware" "$root/boot"; do
    [ -f "$place/scalarfed/report.txt" ] && report=$place/scalarfed/report.txt && break
  done
  # A card wears out by writing: a board that fails for ever says so for a while only.
  [ "$(wc -c <"$report" 2>/dev/null || echo 0)" -ge 32768 ] ||
    echo "$(cut -d' ' -f1 /proc/uptime) $*" >>"$report"
}

if [ "$1" = after ]; then
  [ "${SERVICE_RESULT:-success}" != success ] || exit 0
  words=$(sed -n 's/.*"last_words": "\(.*\)"}$/\1/p' "$var/starts.json" 2>/dev/null)
  note "agent ended: $SERVICE_RESULT ${EXIT_CODE:-} ${EXIT_STATUS:-}: $words"
  exit 0
fi

[ -f "$opt/trial" ] || exit 0
former=$(cat "$opt/trial")
now=$(readlink "$opt/current")

if [ "$(cat "$var/healthy" 2>/dev/null)" = "${now#releases/}" ]; then
  rm -rf "$opt/trial" "$opt/trial.starts" "$var/bundle.former" "$etc/board.json.former"
  # The one before stays, to be returned to by hand; older ones only fill the card.
  for release in "$opt/releases"/*; do
    case releases/${release##*/} in "$now" | "$former") ;; *) rm -rf "$release" ;; esac
  done
  [ ! -f "$opt/update.number" ] ||
    echo "well $(cat "$opt/update.number") ${now#releases/} is well" >"$opt/update.outcome"
  echo "scalarfed: ${now#releases/} is well; it stays"
  exit 0
fi
[ "$1" = before ] || exit 0
starts=$(($(cat "$opt/trial.starts" 2>/dev/null || echo 0) + 1))
echo $starts >"$opt/trial.starts"
if [ $starts -gt 4 ] || [ -f "$var/give-back" ]; then
  if [ -f "$opt/$former/complete" ]; then
    ln -sfn "$former" "$opt/current.new"
    mv -fT "$opt/current.new" "$opt/current"
    if [ -d "$var/bundle.former" ]; then
      rm -rf "$var/bundle"
      mv "$var/bundle.former" "$var/bundle"
    fi
    [ ! -f "$etc/board.json.former" ] || mv -f "$etc/board.json.former" "$etc/board.json"
    echo "${now#releases/}" >"$opt/returned-from"
    echo "returned $(cat "$opt/update.number" 2>/dev/null || echo 0) ${now#releases/} did not join in $starts starts" >"$opt/update.outcome"
    note "update returned: ${now#releases/} did not join in $starts starts; current is ${former#releases/}"
    echo "scalarfed: ${now#releases/} did not join in $starts starts; back to ${former#releases/}"
  fi
  rm -f "$opt/trial" "$opt/trial.starts" "$var/give-back"
fi
exit 0
