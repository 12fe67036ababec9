# Runs parts of a long measurement under one deadline, with one log and every failure named; gpu.sh is written with it.
#   begin SECONDS             the deadline runs, and what is printed also goes to $OUT/log.txt
#   part NAME SECONDS CMD...  one part, stopped after its seconds or what is left; returns its exit code
#   skip NAME WHY             says why a part is not run
#   finish                    prints what became of every part; returns 1 if one failed
# A part is stopped by SIGINT, so that pytest still prints and writes what it knows, and killed GRACE seconds later.
# wanted=(NAME...) before begin: only these parts run. allowed=CODE before part: an exit code that is no failure.

GRACE=${GRACE:-8}        # seconds from SIGINT to SIGKILL
MOST_FILES=${MOST_FILES:-8} # that come back from some machines
wanted=() states=() failures=() failed=0 allowed=""
limit=0 began=0 running="" tee_pid=""

begin() {
    limit=$1 began=$SECONDS
    mkdir -p "$OUT"
    exec 3>&1 4>&2 > >(exec tee -i "$OUT/log.txt") 2>&1
    tee_pid=$!
    trap 'interrupted' INT TERM
    set -m # a part is a group of its own that SIGINT reaches: without it the shell lets what runs behind it ignore that
}

interrupted() {
    trap - INT TERM
    echo "== stopped from outside"
    [ -n "$running" ] && kill -INT -- "-$running" 2>/dev/null && sleep 1 && kill -KILL -- "-$running" 2>/dev/null
    failed=1
    finish
    exit 1
}

is_wanted() { [ ${#wanted[@]} -eq 0 ] || [[ " ${wanted[*]} " == *" $1 "* ]]; }

log_bytes() { stat -c %s "$OUT/log.txt" 2>/dev/null || echo 0; }

note() { # note STATE NAME TEXT
    states+=("$(printf '%-8s %-10s %s' "$1" "$2" "$3")")
    [ "$1" = ok ] || [ "$1" = skipped ] || { failed=1; echo "== $2: $3"; }
}

skip() { is_wanted "$1" && { note skipped "$1" "$2"; echo "== $1 is skipped: $2"; }; return 0; }

part() {
    local name=$1 seconds=$2 start code bytes left fine=$allowed
    shift 2
    allowed=""
    is_wanted "$name" || return 0
    left=$((began + limit - SECONDS - GRACE))
    if [ "$left" -lt 3 ]; then
        note NO-TIME "$name" "not run: the deadline of $limit s is reached"
        return 124
    fi
    [ "$seconds" -le "$left" ] || seconds=$left
    start=$SECONDS bytes=$(log_bytes)
    echo
    echo "== $name (at $((start - began)) s, at most $seconds s)"
    timeout -s INT -k "$GRACE" "$seconds" "$@" </dev/null &
    running=$!
    wait "$running"
    code=$?
    running=""
    local took="$((SECONDS - start)) s"
    case $code in
        0 | "$fine") note ok "$name" "$took" ;;
        124 | 137) note STOPPED "$name" "$took: over its $seconds s" ;;
        126 | 127) note FAILED "$name" "$took: $1 cannot be started" ;;
        12[89] | 1[3-9]?) note CRASHED "$name" "$took: signal $((code - 128)), $(kill -l $((code - 128)) 2>/dev/null)" ;;
        *) note FAILED "$name" "$took: exit code $code" ;;
    esac
    [ "$code" -eq 0 ] || name_failures "$name" "$bytes"
    return "$code"
}

# Every failing test or kernel of a part, from what it printed since: pytest's summary, and, where that was not reached,
# its lines of single tests (pytest -v, with and without -n), with those that began and never ended; the lines of
# gpu_smoke.py; and the last line of all where nothing is named.
name_failures() {
    local line
    sleep 0.3 # tee is behind
    while IFS= read -r line; do
        failures+=("$1: ${line:0:300}")
    done < <(tail -c "+$(($2 + 1))" "$OUT/log.txt" | awk '
        function trimmed(text) { sub(/ *\[ *[0-9]+%\] *$/, "", text); sub(/[ \t]+$/, "", text); return text }
        /[^ ]/ { last = $0 }
        /^(FAILED|ERROR|WRONG) / { said[++count] = $0; next }
        /^\[gw[0-9]+\].* (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) / {
            status = $0; sub(/^\[gw[0-9]+\] (\[ *[0-9]+%\] )?/, "", status)
            id = status; sub(/^[A-Z]+ /, "", id); id = trimmed(id); ended[id] = 1
            if (status ~ /^(FAILED|ERROR)/) wrong[id] = 1
            next
        }
        /^[^ ]+\.py::/ {
            id = trimmed($0); status = ""
            if (match(id, / (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)( .*)?$/)) {
                status = substr(id, RSTART + 1); id = substr(id, 1, RSTART - 1); ended[id] = 1
            } else begun[id] = 1
            if (status ~ /^(FAILED|ERROR)/) wrong[id] = 1
        }
        / WRONG / { id = $0; sub(/ *WRONG .*/, "", id); wrong[id] = 1 }
        END {
            for (n = 1; n <= count; n++) { print said[n]; all = all "\n" said[n] }
            for (id in wrong) if (!index(all, id)) { print "FAILED " id; count++ }
            for (id in begun) if (!(id in ended)) { print "UNFINISHED " id; count++ }
            if (!count) print "its last line: " last
        }')
}

finish() {
    local line files
    echo
    echo "== what became of the parts, after $((SECONDS - began)) of $limit s"
    printf '%s\n' "${states[@]}"
    if [ ${#failures[@]} -gt 0 ]; then
        echo "== ${#failures[@]} failures by name"
        printf '%s\n' "${failures[@]}" | head -200
    fi
    files=("$OUT"/*)
    if [ ${#files[@]} -gt "$MOST_FILES" ]; then
        (cd "$OUT" && tar -czf rest.tgz --exclude=rest.tgz --exclude=log.txt -- * &&
            find . -maxdepth 1 ! -name . ! -name rest.tgz ! -name log.txt -exec rm -rf {} +)
        echo "== more than $MOST_FILES files: all but the log are in rest.tgz"
    fi
    # A process that a part left behind may hold the log open: it must not hold up the end.
    exec >&3 2>&4 3>&- 4>&-
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        kill -0 "$tee_pid" 2>/dev/null || break
        sleep 0.1
    done
    kill "$tee_pid" 2>/dev/null
    return "$failed"
}
