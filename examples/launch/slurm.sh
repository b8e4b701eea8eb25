#!/usr/bin/env bash
# Train on several nodes with Slurm, over as many jobs as the run needs:
#
#   sbatch examples/launch/slurm.sh --model internlm2-7b --data corpus.jsonl --out runs/mine ...
#
# All nodes must see --out. Five minutes before the time limit the run saves and stops, and Slurm
# queues the job again, which resumes the run.
#SBATCH --job-name=internlm2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u

late=0
trap 'late=1; kill -USR1 "$!"' USR1 # srun passes the signal on to every process

# One process for each node, with all of its GPUs; a process that fails ends the others.
srun --kill-on-bad-exit=1 python -m train.main "$@" &
step=$!

status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do # the trap has interrupted `wait`
  status=0
  wait "$step" || status=$?
done

if ((late && status == 0)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
