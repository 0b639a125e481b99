// Copies between strided arrays: what no dense layout describes is brought into one, piece by piece, and back.
//
// One thread an element, the last axis fastest in the destination. Each element is read once and written once.
// Requires: up to six axes, sizes of axes 1..5 and strides of all in elements.

#define AXES                                                                                                         \
  const long long size1, const long long size2, const long long size3, const long long size4, const long long size5, \
      const long long from0, const long long from1, const long long from2, const long long from3,                    \
      const long long from4, const long long from5, const long long to0, const long long to1, const long long to2,   \
      const long long to3, const long long to4, const long long to5

struct Places {
  long long from, to;
  __device__ Places(long long e, AXES) : from(0), to(0) {
    const long long sizes[5] = {size5, size4, size3, size2, size1};
    const long long froms[5] = {from5, from4, from3, from2, from1}, tos[5] = {to5, to4, to3, to2, to1};
#pragma unroll
    for (int axis = 0; axis < 5; ++axis) {
      if (sizes[axis] > 1) {
        const long long rest = e / sizes[axis], i = e - rest * sizes[axis];
        from += i * froms[axis];
        to += i * tos[axis];
        e = rest;
      }
    }
    from += e * from0;
    to += e * to0;
  }
};
#define AXES_ARGUMENTS \
  size1, size2, size3, size4, size5, from0, from1, from2, from3, from4, from5, to0, to1, to2, to3, to4, to5

#ifdef KERNEL_COPY_ELEMENTS
// Elements of 1, 2, 4 or 8 bytes as they are.
extern "C" __global__ void copy_elements(const void* from, void* to, const int bytes, const long long count, AXES) {
  const long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= count) return;
  const Places at(e, AXES_ARGUMENTS);
  if (bytes == 1) ((unsigned char*)to)[at.to] = ((const unsigned char*)from)[at.from];
  else if (bytes == 2) ((unsigned short*)to)[at.to] = ((const unsigned short*)from)[at.from];
  else if (bytes == 4) ((unsigned*)to)[at.to] = ((const unsigned*)from)[at.from];
  else ((unsigned long long*)to)[at.to] = ((const unsigned long long*)from)[at.from];
}
#endif

#ifdef KERNEL_CONVERT_ELEMENTS
// Elements of another dtype, rounded once.
extern "C" __global__ void convert_elements(const void* from, void* to, const int from_dtype, const int to_dtype,
                                            const long long count, AXES) {
  const long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= count) return;
  const Places at(e, AXES_ARGUMENTS);
  store_any(to, to_dtype, at.to, load_any(from, from_dtype, at.from));
}
#endif
