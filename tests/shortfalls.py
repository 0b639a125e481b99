"""What the tests of the CUDA engine found and what is not mended yet: what falls short, and the tests that say so."""

SHORTFALLS = {
    "rows of a misaligned channels-last array: an eighth of the bytes goes element by element": (
        "tests/test_cuda_traffic.py::test_a_misaligned_base_costs_little[last-1]",
        "tests/test_cuda_traffic.py::test_a_misaligned_base_costs_little[last-3]",
    ),
    "bank conflicts: shared memory, not the bus, would limit these shapes": (
        "tests/test_cuda_traffic.py::test_shared_memory_keeps_up[2,64,196,G=32-float16]",
        "tests/test_cuda_traffic.py::test_shared_memory_keeps_up[8,256,49,G=32-float16]",
        "tests/test_cuda_traffic.py::test_shared_memory_keeps_up[64,256,1,G=32-float16]",
        "tests/test_cuda_traffic.py::test_shared_memory_keeps_up[64,256,1,G=32-float32]",
        "tests/test_cuda_traffic.py::test_shared_memory_keeps_up[64,256,1,G=32-float64]",
        "tests/test_cuda_traffic.py::test_shared_memory_keeps_up[16,24,35,G=24-float16]",
        "tests/test_cuda_traffic.py::test_shared_memory_keeps_up[2,30,121,G=1-float16]",
        "tests/test_cuda_traffic.py::test_shared_memory_keeps_up[2,64,196,G=8,last-float64]",
        "tests/test_cuda_traffic.py::test_shared_memory_keeps_up[2,64,196,G=32,last-float16]",
        "tests/test_cuda_traffic.py::test_shared_memory_keeps_up[2,64,96,G=64,last-float16]",
        "tests/test_cuda_traffic.py::test_shared_memory_keeps_up[8,30,49,G=10,last-float16]",
        "tests/test_cuda_traffic.py::test_shared_memory_keeps_up[8,30,49,G=10,last-float32]",
        "tests/test_cuda_traffic.py::test_shared_memory_keeps_up[8,30,49,G=10,last-float64]",
        "tests/test_cuda_traffic.py::test_shared_memory_keeps_up[4,256,16,G=32,last-float16]",
    ),
    "values at the very ends of the range of float64": (
        "tests/test_cuda_values.py::test_accuracy[largest of the dtype, float64-first]",
        "tests/test_cuda_values.py::test_accuracy[largest of the dtype, float64-last]",
        "tests/test_cuda_values.py::test_accuracy[1.7e308 U, float64-first]",
        "tests/test_cuda_values.py::test_accuracy[1.7e308 U, float64-last]",
        "tests/test_cuda_values.py::test_accuracy[constant 1e-310, float64-first]",
        "tests/test_cuda_values.py::test_accuracy[constant 1e-310, float64-last]",
        "tests/test_cuda_values.py::test_accuracy[1e-320 N, eps=0, float64-first]",
        "tests/test_cuda_values.py::test_accuracy[1e-320 N, eps=0, float64-last]",
        "tests/test_cuda_values.py::test_accuracy_of_normalize[largest of the dtype, float64]",
    ),
    "dx under these activations: beyond the bound where the slope is small": (
        "tests/test_cuda_values.py::test_accuracy_of_activations[silu-float32]",
        "tests/test_cuda_values.py::test_accuracy_of_activations[gelu_tanh-float32]",
        "tests/test_cuda_values.py::test_accuracy_of_activations[gelu_tanh-float64]",
    ),
    "the largest resident group of this layout is smaller than the shared memory allows": (
        "tests/test_cuda_values.py::test_both_sides_of_the_largest_resident_group[float64-last]",
    ),
    "empty arrays go to the reference, whose CuPy calls the emulator cannot run": (
        "tests/test_cuda_values.py::test_empty_arrays",
    ),
    "no check notices this change of the kernels yet": (
        "tests/test_cuda_mutants.py::test_it_is_noticed[no barrier before labels are added]",
    ),
    "float16 and bfloat16: a stack frame in apply_statistics, and narrower accesses in backward_apply": (
        "tests/test_cuda_static.py::test_no_spills_and_no_local_memory",
        "tests/test_cuda_static.py::test_global_accesses_are_16_bytes_wide",
    ),
}
