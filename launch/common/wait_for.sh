# shellcheck shell=bash disable=SC2034  # the script that sources this reads `code`
# wait_for PID: waits for a process of this shell, whatever signals come meanwhile; its code is in `code`.
wait_for() {
    while :; do
        wait "$1"
        code=$?
        kill -0 "$1" 2>/dev/null || break     # else a signal ended the wait, not the process
    done
    if [ "$code" -gt 128 ]; then
        local last
        wait "$1" 2>/dev/null                 # it ended while the signal was handled: its own code
        last=$?
        [ "$last" -eq 127 ] || code=$last
    fi
}
