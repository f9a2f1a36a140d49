#!/bin/sh
# check_symbols.sh LIBRARY ISA: fails when LIBRARY defines a weak symbol that does not belong to
# namespace randlora::ISA. The linker keeps one copy of such a symbol for all kernel sets, and it
# might be the copy with instructions that the machine does not have.
set -eu
mangled="${#2}$2"
nm "$1" | grep -q "$mangled" || { echo "no symbol of $2 in $1"; exit 1; }
leaks=$(nm "$1" | awk '$2 ~ /^[WVu]$/ {print $3}' | grep -v "$mangled" || true)
[ -z "$leaks" ] && exit 0
printf 'weak symbols of %s outside its namespace:\n%s\n' "$1" "$leaks"
exit 1
