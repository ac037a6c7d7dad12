# shellcheck shell=bash
# Sourced by the scripts: what they answer to --help.

asks_for_help() { # ARGUMENTS
  local word
  for word in "$@"; do
    if [[ $word == -h || $word == --help ]]; then return 0; fi
  done
  return 1
}

# Prints the comment at the top of the script that runs.
print_header() { sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0"; }
