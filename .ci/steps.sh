# What .ci/run and .ci/kernels share; both have set $repo and $work, a folder for what they write.

step() {
  local used  # seconds of processor time
  used=$(awk '{print int(($16 + $17) / 100)}' /proc/$$/stat)
  [ -z "${step_name:-}" ] || printf -- '--- took %d s, %d s of processor time: %s\n' \
    $((SECONDS - step_began)) $((used - step_used)) "$step_name"
  step_name=$* step_began=$SECONDS step_used=$used
  printf '\n=== [%4ds] %s\n' "$SECONDS" "$*"
}

# A clone: what is not committed is not there, and nothing is left behind.
clone() {
  git clone -q "$repo" "$work/$1"
  cd "$work/$1"
}
