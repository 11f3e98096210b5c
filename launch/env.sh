# shellcheck shell=bash
# Environment of the processes that torchrun.sh starts. To be sourced, also before `accelerate launch`:
#   . launch/env.sh
# A variable that is set already, even to nothing, stays as it is. Names as torch 2.13 reads them.

# ---- when a GPU run hangs or loses a rank

# The flight recorder keeps the last collectives of each rank. 2000 is torch's default; it is stated because 0 turns it off.
: "${TORCH_FR_BUFFER_SIZE=2000}"
# Written when a collective runs into its timeout: one file a rank, PREFIX + rank, to be read with
# `torchfrtrace --prefix PREFIX FOLDER`. Not in ~/.cache, where containers lose it and several jobs share it.
: "${TORCH_NCCL_DUMP_ON_TIMEOUT=1}"
: "${TORCH_FR_DUMP_TEMP_FILE=${TMPDIR:-/tmp}/dctc-flight-${SLURM_JOB_ID:-$$}-rank-}"
# 3: on an error end the process without aborting the communicator first, which itself can hang. It is torch's default,
# but torchrun sets 1 in each rank unless the variable is there.
: "${TORCH_NCCL_ASYNC_ERROR_HANDLING=3}"
# Errors with their reason; INFO also says which network and which topology NCCL chose.
: "${NCCL_DEBUG=WARN}"
# Where machines have several networks, name the one that connects them; the wrong one shows as a hang at the start.
# `ip -brief address` lists them. NCCL takes prefixes, gloo (CPU runs, and some small exchanges) one exact name.
#   export NCCL_SOCKET_IFNAME=eth GLOO_SOCKET_IFNAME=eth0

# ---- threads

# Without it torchrun gives each of several ranks one thread. Each rank's share of the cores this process may use:
_cores=$(nproc)
: "${OMP_NUM_THREADS=$((_cores > ${NPROC_PER_NODE:-1} ? _cores / ${NPROC_PER_NODE:-1} : 1))}"
unset _cores
# Threads that wait for work sleep: spinning ones slow down ranks and loader processes that share the cores.
: "${OMP_WAIT_POLICY=PASSIVE}"

# ---- memory and messages

# Segments that grow leave fewer holes where batch shapes change (training, validation, test). CUDA only.
: "${PYTORCH_ALLOC_CONF=expandable_segments:True}"
# A traceback also for a crash in native code.
: "${PYTHONFAULTHANDLER=1}"
# Lines of a rank that is killed are not lost in a buffer.
: "${PYTHONUNBUFFERED=1}"

export TORCH_FR_BUFFER_SIZE TORCH_NCCL_DUMP_ON_TIMEOUT TORCH_FR_DUMP_TEMP_FILE TORCH_NCCL_ASYNC_ERROR_HANDLING \
    NCCL_DEBUG OMP_NUM_THREADS OMP_WAIT_POLICY PYTORCH_ALLOC_CONF PYTHONFAULTHANDLER PYTHONUNBUFFERED
