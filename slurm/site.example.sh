# shellcheck shell=bash
# Settings for your site. Copy this file to slurm/site.sh (or set DTL_SITE to another file) and keep the lines that you need.
# The templates source it on the first node of the job, before anything else. Exported variables reach the ranks on all nodes.
# For partition, account and quality of service use options of sbatch, or SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS in your shell.

# module load python/3.11 cuda/12.4
# source "$HOME/venvs/dtl/bin/activate"
# export DTL_WRAP="apptainer exec --nv $HOME/dtl.sif"        # a container; Slurm's own commands run outside of it
# export DTL_PYTHON=python3

# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0       # if nodes have several networks: the one that they share
# export DTL_CACHE=/shared/$USER/dtl-cache                   # one cache for all nodes instead of one on each node's disk
# A cache that a group shares needs --data.cache-shared true in the recipe or the command; without it, a folder that others may write is refused.
# export WANDB_MODE=offline                                  # if nodes have no internet access; run `wandb sync` later
