// CUDA graphs: a capture records nothing, and refuses the same calls as on a GPU. There is one at a time, over all streams.
#include "stub.h"
#include <atomic>

static std::atomic<bool> capturing = false;
static std::atomic<unsigned long long> captures = 0;

ANSWER(cudaError_t) cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  ++captures, capturing = true;
  return cudaSuccess;
}
ANSWER(cudaError_t) cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  capturing = false, *graph = (cudaGraph_t)rehearsal_handle();
  return cudaSuccess;
}
ANSWER(cudaError_t) cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
ANSWER(cudaError_t) cudaStreamGetCaptureInfo(
    cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* number, cudaGraph_t* graph,
    const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, size_t* size) {
  if (number) *number = captures;
  if (graph) *graph = nullptr;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (size) *size = 0;
  return cudaStreamIsCapturing(stream, status);
}
ANSWER(cudaError_t) cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* size) { *size = 1; return cudaSuccess; }
ANSWER(cudaError_t) cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { rehearsal_launched(); return cudaSuccess; }

// During a capture the host cannot wait: work is only recorded.
static cudaError_t waited() { return capturing ? cudaErrorStreamCaptureUnsupported : cudaSuccess; }
ANSWER(cudaError_t) cudaDeviceSynchronize() { return waited(); }
ANSWER(cudaError_t) cudaStreamSynchronize(cudaStream_t) { return waited(); }
ANSWER(cudaError_t) cudaEventSynchronize(cudaEvent_t) { return waited(); }
