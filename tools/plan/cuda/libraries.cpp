// cuBLAS and NCCL. Small results of collectives are as if all ranks had equal values. no_op_cuda.py has the other functions.
#include "stub.h"
#include <cstring>
#include <cublasLt.h>
#include <nccl.h>

ANSWER(cublasStatus_t) cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
    cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t* found, int* number) {
  memset(found, 0, sizeof *found);
  found->state = CUBLAS_STATUS_SUCCESS;
  *number = 1;
  return CUBLAS_STATUS_SUCCESS;
}

struct Communicator { int ranks, rank; };
// The size of the next communicator that is split off. Python sets it, because the real NCCL would ask the other ranks.
static Communicator next;
ANSWER(void) rehearsal_next_communicator(int ranks, int rank) { next = {ranks, rank}; }

static ncclResult_t make(ncclComm_t* made, int ranks, int rank) {
  *made = (ncclComm_t)rehearsal_handle();
  *(Communicator*)*made = {ranks, rank};
  return ncclSuccess;
}
ANSWER(ncclResult_t) ncclGetVersion(int* version) { *version = NCCL_VERSION_CODE; return ncclSuccess; }
ANSWER(ncclResult_t) ncclGetUniqueId(ncclUniqueId* id) { memset(id, 7, sizeof *id); return ncclSuccess; }
ANSWER(ncclResult_t) ncclCommInitRankConfig(ncclComm_t* made, int ranks, ncclUniqueId, int rank, ncclConfig_t*) {
  return make(made, ranks, rank);
}
ANSWER(ncclResult_t) ncclCommInitRank(ncclComm_t* made, int ranks, ncclUniqueId, int rank) {
  return make(made, ranks, rank);
}
ANSWER(ncclResult_t) ncclCommInitRankScalable(ncclComm_t* made, int ranks, int rank, int, ncclUniqueId*, ncclConfig_t*) {
  return make(made, ranks, rank);
}
ANSWER(ncclResult_t) ncclCommSplit(ncclComm_t whole, int, int, ncclComm_t* made, ncclConfig_t*) {
  return make(made, next.ranks ? next.ranks : ((Communicator*)whole)->ranks, next.rank);
}
ANSWER(ncclResult_t) ncclCommCount(const ncclComm_t made, int* ranks) { *ranks = ((Communicator*)made)->ranks; return ncclSuccess; }
ANSWER(ncclResult_t) ncclCommUserRank(const ncclComm_t made, int* rank) { *rank = ((Communicator*)made)->rank; return ncclSuccess; }

static size_t bytes_of(size_t number, ncclDataType_t type) {
  switch (type) {
    case ncclInt8: case ncclUint8: return number;
    case ncclFloat16: case ncclBfloat16: return 2 * number;
    case ncclInt32: case ncclUint32: case ncclFloat32: return 4 * number;
    default: return 8 * number;
  }
}
ANSWER(ncclResult_t) ncclAllReduce(
    const void* from, void* to, size_t number, ncclDataType_t type, ncclRedOp_t, ncclComm_t, cudaStream_t) {
  rehearsal_launched();
  copy_small(to, from, bytes_of(number, type));
  return ncclSuccess;
}
ANSWER(ncclResult_t) ncclBroadcast(
    const void* from, void* to, size_t number, ncclDataType_t type, int, ncclComm_t, cudaStream_t) {
  rehearsal_launched();
  copy_small(to, from, bytes_of(number, type));
  return ncclSuccess;
}
ANSWER(ncclResult_t) ncclAllGather(
    const void* from, void* to, size_t number, ncclDataType_t type, ncclComm_t made, cudaStream_t) {
  rehearsal_launched();
  size_t bytes = bytes_of(number, type);
  int ranks = ((Communicator*)made)->ranks;
  for (int rank = 0; bytes * ranks <= SMALL && rank < ranks; ++rank) copy_small((char*)to + rank * bytes, from, bytes);
  return ncclSuccess;
}
