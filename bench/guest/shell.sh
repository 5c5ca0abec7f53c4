#!/bin/sh
# shell.sh COUNT: what a configure script does: tests, substitutions, pipes and small files, nearly all of it by new processes.
set -e
n=0
mkdir -p /tmp/shell
cd /tmp/shell
while [ $n -lt "$1" ]; do
    name=$(echo "lib$n.so" | sed -e 's/lib//' -e 's/\.so//')
    [ "$name" = "$n" ]
    cat >conf.c <<END
#include <stdio.h>
int main(void) { return $n; }
END
    if grep -q "return $n" conf.c && test -s conf.c; then
        lines=$(wc -l <conf.c | tr -d ' ')
        case $lines in 2) : ;; *) exit 1 ;; esac
    fi
    dir=$(dirname "/usr/include/$name/x.h")
    base=$(basename "$dir")
    (cd / && test -d proc && expr "$base" + 1 >/dev/null)
    rm -f conf.c
    n=$((n + 1))
done
