#!/bin/bash
# Train on the nodes of a SLURM job, a process a GPU, or one a node without GPUs. With the environment activated, in the
# root of the repository, on a file system that all nodes share:
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh r3gan-cifar10 --data cifar10 --run-dir runs/large
# The same command again, or SLURM after a preemption, goes on with the run.
#SBATCH --job-name=gen_dist
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1  # a launcher, which starts the node's processes
#SBATCH --exclusive          # all CPUs of the nodes
#SBATCH --signal=TERM@180    # three minutes before the time is up: the run saves and ends
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
nodes=${#hosts[@]}
gpus=${SLURM_GPUS_ON_NODE:-0}
if ((gpus > 0)); then
    config=launch/configs/hosts_8_gpus.yaml processes=$((nodes * gpus))
else
    config=launch/configs/hosts_cpu.yaml processes=$nodes
fi
port=$((20000 + SLURM_JOB_ID % 10000))  # jobs that share a node must not share a port

# The node's number is known on the node alone, so the inner shell puts it in. srun does not take over the CPUs of a
# task from sbatch; without them all processes of a node would share one.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
    bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' launch \
    --config_file "$config" --num_machines "$nodes" --num_processes "$processes" \
    --main_process_ip "${hosts[0]}" --main_process_port "$port" launch/train.py "$@"
