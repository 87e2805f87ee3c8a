"""Executes compiled PTX on the CPU: what the compiler made of a kernel, checked where there is no GPU.

One block at a time, all its threads in lockstep. It computes results and reports races, misaligned or
stray accesses, bank conflicts, overwritten operands of wgmma, and asynchronous copies nobody waited for.

What it cannot show. It was written from the PTX manual and has not been validated against hardware.
Threads of a block do not drift apart, so a race shows only by the barrier that is missing between two
accesses, and divergent branches are refused. wgmma delivers its result at issue: a missing wait for the
result is not seen (one for the operands is). Products are summed in float64 and rounded once; the special
functions (ex2, lg2, ...) are exact rather than approximate; subnormal numbers are kept. Instructions that
these kernels do not use are refused by name: bulk copies, mbarriers, atomics, clusters. No time is modelled.
"""
