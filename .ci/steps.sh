# What .ci/run and .ci/kernels share; both have set $repo and $work, a folder for what they write.

step() {
  [ -z "${step_name:-}" ] || printf -- '--- took %d s: %s\n' $((SECONDS - step_began)) "$step_name"
  step_name=$* step_began=$SECONDS
  printf '\n=== [%4ds] %s\n' "$SECONDS" "$*"
}

# A clone with a space in its path: what is not committed is not there, and nothing is left behind.
clone() {
  git clone -q "$repo" "$work/$1"
  cd "$work/$1"
}
