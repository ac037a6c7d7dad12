// cuBLAS and NCCL. Small results of collectives are as if all ranks had the same; products, and collectives whose results
// the host does not read, are in build.py's table LAUNCHES.
#include "stub.h"
#include <cstdlib>
#include <cstring>
#include <cublasLt.h>
#include <cublas_v2.h>
#include <nccl.h>

static void* large_handle() { return calloc(1, 4096); }

ANSWER(cublasStatus_t) cublasCreate_v2(cublasHandle_t* handle) {
  *handle = (cublasHandle_t)large_handle();
  return CUBLAS_STATUS_SUCCESS;
}
ANSWER(cublasStatus_t) cublasGetMathMode(cublasHandle_t, cublasMath_t* mode) {
  *mode = CUBLAS_DEFAULT_MATH;
  return CUBLAS_STATUS_SUCCESS;
}
ANSWER(cublasStatus_t) cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t* mode) {
  *mode = CUBLAS_POINTER_MODE_HOST;
  return CUBLAS_STATUS_SUCCESS;
}
ANSWER(cublasStatus_t) cublasLtCreate(cublasLtHandle_t* handle) {
  *handle = (cublasLtHandle_t)large_handle();
  return CUBLAS_STATUS_SUCCESS;
}
ANSWER(cublasStatus_t) cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* made, cublasComputeType_t, cudaDataType_t) {
  *made = (cublasLtMatmulDesc_t)large_handle();
  return CUBLAS_STATUS_SUCCESS;
}
ANSWER(cublasStatus_t) cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* made, cudaDataType, uint64_t, uint64_t, int64_t) {
  *made = (cublasLtMatrixLayout_t)large_handle();
  return CUBLAS_STATUS_SUCCESS;
}
ANSWER(cublasStatus_t) cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* made) {
  *made = (cublasLtMatmulPreference_t)large_handle();
  return CUBLAS_STATUS_SUCCESS;
}
ANSWER(cublasStatus_t) cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t made) { free(made); return CUBLAS_STATUS_SUCCESS; }
ANSWER(cublasStatus_t) cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t made) { free(made); return CUBLAS_STATUS_SUCCESS; }
ANSWER(cublasStatus_t) cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t made) {
  free(made);
  return CUBLAS_STATUS_SUCCESS;
}
ANSWER(cublasStatus_t) cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
    cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t* found, int* number) {
  memset(found, 0, sizeof *found);
  found->state = CUBLAS_STATUS_SUCCESS;
  *number = 1;
  return CUBLAS_STATUS_SUCCESS;
}

struct Communicator { int ranks, rank; };
// How large the next communicator is that is split off; Python says so, for NCCL would ask the others.
static Communicator next;
ANSWER(void) rehearsal_next_communicator(int ranks, int rank) { next = {ranks, rank}; }

static ncclComm_t communicator(int ranks, int rank) {
  auto* made = (Communicator*)large_handle();
  *made = {ranks, rank};
  return (ncclComm_t)made;
}
ANSWER(ncclResult_t) ncclGetVersion(int* version) { *version = NCCL_VERSION_CODE; return ncclSuccess; }
ANSWER(ncclResult_t) ncclGetUniqueId(ncclUniqueId* id) { memset(id, 7, sizeof *id); return ncclSuccess; }
ANSWER(ncclResult_t) ncclCommInitRankConfig(ncclComm_t* made, int ranks, ncclUniqueId, int rank, ncclConfig_t*) {
  *made = communicator(ranks, rank);
  return ncclSuccess;
}
ANSWER(ncclResult_t) ncclCommInitRank(ncclComm_t* made, int ranks, ncclUniqueId, int rank) {
  *made = communicator(ranks, rank);
  return ncclSuccess;
}
ANSWER(ncclResult_t) ncclCommInitRankScalable(ncclComm_t* made, int ranks, int rank, int, ncclUniqueId*, ncclConfig_t*) {
  *made = communicator(ranks, rank);
  return ncclSuccess;
}
ANSWER(ncclResult_t) ncclCommSplit(ncclComm_t whole, int, int, ncclComm_t* made, ncclConfig_t*) {
  *made = communicator(next.ranks ? next.ranks : ((Communicator*)whole)->ranks, next.rank);
  return ncclSuccess;
}
ANSWER(ncclResult_t) ncclCommGetAsyncError(ncclComm_t, ncclResult_t* error) { *error = ncclSuccess; return ncclSuccess; }
ANSWER(ncclResult_t) ncclCommCount(const ncclComm_t made, int* ranks) { *ranks = ((Communicator*)made)->ranks; return ncclSuccess; }
ANSWER(ncclResult_t) ncclCommUserRank(const ncclComm_t made, int* rank) { *rank = ((Communicator*)made)->rank; return ncclSuccess; }
ANSWER(const char*) ncclGetLastError(ncclComm_t) { return "an error in a rehearsal"; }

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
  count("launch", "ncclAllReduce");
  copy_small(to, from, bytes_of(number, type));
  return ncclSuccess;
}
ANSWER(ncclResult_t) ncclBroadcast(
    const void* from, void* to, size_t number, ncclDataType_t type, int, ncclComm_t, cudaStream_t) {
  count("launch", "ncclBroadcast");
  copy_small(to, from, bytes_of(number, type));
  return ncclSuccess;
}
ANSWER(ncclResult_t) ncclAllGather(
    const void* from, void* to, size_t number, ncclDataType_t type, ncclComm_t made, cudaStream_t) {
  count("launch", "ncclAllGather");
  size_t bytes = bytes_of(number, type);
  int ranks = ((Communicator*)made)->ranks;
  for (int rank = 0; bytes * ranks <= SMALL && rank < ranks; ++rank) copy_small((char*)to + rank * bytes, from, bytes);
  return ncclSuccess;
}
