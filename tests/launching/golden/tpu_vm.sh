#!/bin/bash
# Asks for a v5p slice of 4x4x4, trains on it, and asks again when it is taken away. The same
# command goes on from what was saved: the work directory must be on a file system that outlives the slice, and is the same
# on all hosts.
set -u

name=griffin
gcloud="gcloud --quiet"

command -v gcloud >/dev/null || { echo "gcloud is not on this machine" >&2; exit 1; }

# NONE if there is no such slice, UNKNOWN if gcloud could not find out, as when the network is gone.
state() {
  local errors describe="$gcloud compute tpus queued-resources describe"
  { errors=$($describe "$name" --zone=us-east5-a --project=mine --format='value(state.state)' 2>&1 >&3); } 3>&1 && return
  case "$errors" in
    *NOT_FOUND*) echo NONE ;;
    *) echo "$errors" >&2; echo UNKNOWN ;;
  esac
}

on_all() {
  $gcloud compute tpus tpu-vm ssh "$name" --zone=us-east5-a --project=mine --worker=all --command="$1"
}

while true; do
  case "$(state)" in
    NONE) $gcloud compute tpus queued-resources create "$name" --zone=us-east5-a --project=mine --node-id=griffin --type=v5p --topology=4x4x4 --runtime-version=v2-alpha-tpuv5 --spot || exit 1 ;;
    SUSPENDED | FAILED) $gcloud compute tpus queued-resources delete "$name" --zone=us-east5-a --project=mine --force || exit 1 ;;
    ACTIVE)
      on_all 'test -d jaxlinear || git clone -q /shared/jaxlinear; cd jaxlinear && pip install -q '"'"'.[tpu]'"'"'' && on_all 'cd jaxlinear && until python launch/train.py --config=configs/griffin_100m.py --workdir=/shared/runs/griffin --config.model.pattern=rg_lru,gla --expect=tpu:64; do status=$?; [ "$status" -eq 75 ] || exit "$status"; done' && exit 0
      status=$?
      # A slice that is gone is no failure of the run; ssh ends with 255 then, a while before the state says so.
      [ "$status" -eq 255 ] && sleep 60
      [ "$(state)" = ACTIVE ] && exit "$status"
      ;;
  esac
  sleep 30
done
