#!/bin/sh
# Runs as root before each start of the agent. While a new release is on trial, goes back to the former one
# when the new one has been started four times, or gives up, without having joined its run.
#
#   guard.sh [ROOT]
set -u
opt=${1:-}/opt/scalarfed var=${1:-}/var/lib/scalarfed
[ -f "$opt/trial" ] || exit 0
former=$(cat "$opt/trial")
now=$(readlink "$opt/current")

if [ "$(cat "$var/healthy" 2>/dev/null)" = "${now#releases/}" ]; then
  rm -f "$opt/trial" "$opt/trial.starts"
  echo "scalarfed: ${now#releases/} is well; it stays"
  exit 0
fi
starts=$(($(cat "$opt/trial.starts" 2>/dev/null || echo 0) + 1))
echo $starts >"$opt/trial.starts"
if [ $starts -gt 4 ] || [ -f "$var/give-back" ]; then
  if [ -f "$opt/$former/complete" ]; then
    ln -sfn "$former" "$opt/current.new"
    mv -fT "$opt/current.new" "$opt/current"
    echo "${now#releases/}" >"$opt/returned-from"
    echo "scalarfed: ${now#releases/} did not join in $starts starts; back to ${former#releases/}"
  fi
  rm -f "$opt/trial" "$opt/trial.starts" "$var/give-back"
fi
exit 0
