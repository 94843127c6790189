#!/bin/bash
# Asks for a v5p slice of 4x4x4, trains on it, and asks again when it is taken away. The same
# command goes on from what was saved: the work directory must be on a file system that outlives the slice, and is the same
# on all hosts.
set -u

name=griffin
gcloud="gcloud --quiet"

state() {
  $gcloud compute tpus queued-resources describe "$name" --zone=us-east5-a --project=mine --format='value(state.state)' 2>/dev/null
}

on_all() {
  $gcloud compute tpus tpu-vm ssh "$name" --zone=us-east5-a --project=mine --worker=all --command="$1"
}

while true; do
  case "$(state)" in
    ACTIVE) ;;
    "") $gcloud compute tpus queued-resources create "$name" --zone=us-east5-a --project=mine --node-id=griffin --accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 --spot || exit 1 ;;
    SUSPENDED | FAILED) $gcloud compute tpus queued-resources delete "$name" --zone=us-east5-a --project=mine --force || exit 1 ;;
  esac
  while [ "$(state)" != ACTIVE ]; do
    case "$(state)" in SUSPENDED | FAILED | "") continue 2 ;; esac
    sleep 30
  done
  on_all 'test -d jaxlinear || git clone -q /shared/jaxlinear; cd jaxlinear && pip install -q '"'"'.[tpu]'"'"'' && on_all 'cd jaxlinear && until python launch/train.py --config=configs/griffin_100m.py --workdir=/shared/runs/griffin --config.model.pattern=rg_lru,gla --expect=tpu:64; do status=$?; [ "$status" -eq 75 ] || exit "$status"; done' && exit 0
  # A slice that is gone is no failure of the run.
  [ "$(state)" = ACTIVE ] && exit 1
done
