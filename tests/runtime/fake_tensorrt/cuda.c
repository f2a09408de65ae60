/* A CUDA for tests without a GPU: device memory is the host's, a launch of a graph takes 0.2 ms, misuse is an error.
 * Built as libcudart and libcuda; what it refuses is what the real library refuses: freeing twice, launching a graph
 * that was destroyed, synchronizing while a stream is captured. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { ALIVE = 0x1234, DEAD = 0x4321, SLOTS = 4096 };
typedef struct { int state; struct timespec at; } Object;

static void *allocated[SLOTS];
static int capturing;

static Object *made(void) {
    Object *object = calloc(1, sizeof(Object));
    object->state = ALIVE;
    return object; /* never freed: using it afterwards has to be noticed */
}

int cudaSetDevice(int device) { return device == 0 ? 0 : 101; }
int cudaMalloc(void **pointer, size_t size) {
    for (int k = 0; k < SLOTS; k++)
        if (!allocated[k]) {
            *pointer = allocated[k] = malloc(size);
            memset(*pointer, 0x7f, size); /* poison: what is not written is seen */
            return 0;
        }
    return 2;
}
int cudaFree(void *pointer) {
    for (int k = 0; k < SLOTS; k++)
        if (allocated[k] == pointer) {
            free(pointer);
            allocated[k] = 0;
            return 0;
        }
    return 1;
}
int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
    if (kind != 1 && kind != 2) return 21;
    memcpy(to, from, size);
    return 0;
}
int cudaStreamCreate(void **stream) { *stream = made(); return 0; }
int cudaStreamSynchronize(void *stream) { return capturing || !stream ? 900 : 0; }
int cudaStreamBeginCapture(void *stream, int mode) { (void)mode; capturing = 1; return stream ? 0 : 400; }
int cudaStreamEndCapture(void *stream, void **graph) { capturing = 0; *graph = made(); return stream ? 0 : 400; }
int cudaGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
    (void)flags;
    *executable = made();
    return ((Object *)graph)->state == ALIVE ? 0 : 400;
}
static int destroyed(Object *object) {
    if (object->state != ALIVE) return 400;
    object->state = DEAD;
    return 0;
}
int cudaGraphDestroy(void *graph) { return destroyed(graph); }
int cudaGraphExecDestroy(void *graph) { return destroyed(graph); }
int cudaGraphLaunch(void *graph, void *stream) {
    struct timespec wait = {0, 200000};
    if (((Object *)graph)->state != ALIVE || !stream) return 400;
    nanosleep(&wait, 0);
    return 0;
}
int cudaEventCreate(void **event) { *event = made(); return 0; }
int cudaEventRecord(void *event, void *stream) {
    (void)stream;
    return clock_gettime(CLOCK_MONOTONIC, &((Object *)event)->at);
}
int cudaEventSynchronize(void *event) { (void)event; return 0; }
int cudaEventElapsedTime(float *ms, void *from, void *to) {
    Object *a = from, *b = to;
    *ms = (float)((b->at.tv_sec - a->at.tv_sec) * 1e3 + (b->at.tv_nsec - a->at.tv_nsec) / 1e6);
    return 0;
}
const char *cudaGetErrorString(int code) { return code == 400 ? "invalid resource handle" : "an error of the CUDA for tests"; }

int cuInit(unsigned int flags) { return (int)flags; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGetName(char *name, int size, int device) { (void)device; strncpy(name, "CUDA for tests", size); return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { (void)device; *value = attribute == 75 ? 9 : 0; return 0; }
