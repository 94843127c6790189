# Starts the run on this host if there is none, and follows what it writes until it ends. launch/submit.py wrote what is
# above: where that is ($run.log, with other files beside it), where the run starts, and training, its command.
cd "$directory" || exit 3
: >> "$run.log"
exec 9>> "$run.lock"
if flock -n 9; then
  rm -f "$run.status"
  (
    trap "" HUP        # the connection is lost
    trap told=yes TERM # the machine is taken away: the run saves itself, and is not started here again
    status=$preempted told=no
    while [ "$status $told" = "$preempted no" ]; do
      training 9>&-
      status=$?
    done
    echo "$status" > "$run.status"
    sleep 2 # what follows the run has read its last words then
  ) < /dev/null >> "$run.log" 2>&1 &
  echo $! > "$run.pid"
fi
exec 9>&-
tail -n 20 -f --pid="$(cat "$run.pid")" "$run.log"
status=$(cat "$run.status" || echo 137)
[ "$status" -eq 1 ] && status=101 # 1 is gcloud's own
exit "$status"
