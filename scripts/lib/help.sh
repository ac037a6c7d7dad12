# shellcheck shell=bash
# Sourced by the scripts: what they answer to --help.

asks_for_help() { [[ " $* " == *" -h "* || " $* " == *" --help "* ]]; }

# Prints the comment at the top of the script that runs.
print_header() { sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0"; }
