"""The numbers that a kernel runs by, as int64 words in one block of memory, by name.

`geometry.py` fills them from a plan, kernels read them with `word` (`access.py`). Strides and offsets are in bytes,
sizes in elements.
"""

from __future__ import annotations

# the arrays, canonical: (N, OUTER, C, INNER); a sample is BUNDLES tasks of BUNDLE_CHANNELS channels
(N, OUTER, C, INNER, BUNDLES, BUNDLE_CHANNELS) = range(6)
# of a bundle: groups; segments, the runs with statistics of their own; of the whole array: groups
(GROUPS, SEGMENTS, ALL_GROUPS) = range(6, 9)
# a chunk is ROWS x CHANNELS x PART elements; so many of them along each axis and in all
(ROWS, CHANNELS, PART, ROW_CHUNKS, CHANNEL_CHUNKS, PARTS, CHUNKS) = range(9, 16)
# statistics column by column; coefficients element by element of a row; one chunk a ticket
(BY_COLUMNS, BY_ROWS, SPLIT) = range(16, 19)
# tickets: in all; "whole": samples and bundles of one, "split": tasks of a wave
(TICKETS, TICKET_SAMPLES, TICKET_BUNDLES, BUNDLE_TICKETS, WAVE_TASKS) = range(19, 24)
# memory: participants at most, where and how large their scratch is, the stores of split tasks, the gradients' sums
(SLOTS, SCRATCH_AT, SCRATCH_BYTES, STORE_AT, STORE_BYTES, PROGRESS_AT, GRADIENTS_AT, GRADIENT_BYTES) = range(24, 32)
# within a store: partials or sums of each layer of chunks, then totals of each channel. The partials of labelled
# channels are four arrays over the channels for each layer
(LAYERS, PARTIALS_AT, SUMS_AT, TOTALS_AT) = range(32, 36)
# within a scratch: weight and bias as float64, the store of a "whole" task, room for blocks, coefficients,
# gathered chunks
(WEIGHT_AT, BIAS_AT, OWN_STORE_AT, BLOCKS_AT, COEFFICIENTS_AT, COEFFICIENT_BYTES, PIECES_AT, PIECE_BYTES) = range(
    36, 44
)
# streaming stores; eps as bits; dtypes of the vectors of length C
(STREAM, EPS, WEIGHT_KIND, BIAS_KIND) = range(44, 48)
(FLOAT32, FLOAT64, FLOAT16, BFLOAT16) = range(4)
# addresses of the labels' arrays (0 without labels)
(LABELS, ORDER, BOUNDS) = range(48, 51)
# sums in the backward: samples of one partial sum, and how many partial sums
(PART_SAMPLES, GRADIENT_PARTS) = range(51, 53)
# channels of a group (0 with labels)
GROUP_CHANNELS = 53
# records that a participant makes from given statistics; padded channels of a bundle
(OWN_RECORDS_AT, PADDED_WIDTH) = range(54, 56)
# room for a chunk of a mask; bytes at the start of a workspace that are zero when a call begins
(MASK_PIECE_AT, CLEARED) = range(56, 58)
# eight arrays of eight words: (strided, sn, so, itemsize, address of its axes, whether its batch axes are several,
# which no stride goes through); the last is the mask
ARRAYS, ARRAY_WORDS = 58, 8
MASK = 7
# how many phases there are, and of each the addresses of what runs on a chunk and of what finishes a task, or 0
# sixteen samples at a time: how many there are; of a participant, room for their means and rstds, the channels of each
# array, their booleans
SAMPLES, LANE_STATISTICS_AT, TURNED_AT, TURNED_BYTES, TURNED_MASK_AT = range(
    ARRAYS + (MASK + 1) * ARRAY_WORDS, ARRAYS + (MASK + 1) * ARRAY_WORDS + 5
)
# a participant's room for dz: of a whole task, or 0; of one group of sixteen samples
KEPT_AT = TURNED_MASK_AT + 1
# bytes of rows that are touched in the order of memory before a kernel goes over them column by column; 0 in cache
TOUCHED = KEPT_AT + 1
PHASES = TOUCHED + 1
MOST_PHASES = 3
RUN = PHASES + 1
FINISH = RUN + MOST_PHASES
WORDS = FINISH + MOST_PHASES
(STRIDED, SN, SO, ITEMSIZE, AXES, APART) = range(6)

# A record, 16 float64 for each group of a task: what the statistics mean for its elements.
# x_hat = (x*POWER + MINUS_HIGH + MINUS_LOW) * RATIO; POWER is the power of two next to rstd
(MEAN, RSTD, POWER, MINUS_HIGH, MINUS_LOW, RATIO, COUNT, SLOPE, OFFSET) = range(9)
# what the double backward adds: gx = GX_POWER * (.. + GX_OFFSET + GX_SLOPE*t + POWER*(GX_V*.. + GX_U*.. + ..))
(GX_OFFSET, GX_SLOPE, GX_V, GX_U, GX_INNER_SLOPE, GX_INNER_OFFSET, GX_POWER) = range(9, 16)
# of the backward, in the place of the first of these: dx = DX_POWER * (..), which is POWER but for a group of two
DX_POWER = 9
RECORD_BYTES = 128
PARTIAL_BYTES = 32

# Start of a workspace: tickets done; as int64 words the address of the call's entry and its arguments, for helpers;
# then the tickets taken from each participant's range in each round, 64 bytes apart: no cache line is shared
DONE, FUNCTION, ARGUMENTS = 0, 8, 9
HEADER_BYTES = 320

# The memory of a pool of helpers: the call that is offered, how many there were, helpers inside; a line each
(POOL_CALL, POOL_NUMBER, POOL_INSIDE) = (0, 64, 128)
POOL_BYTES = 192


# A call, int64 words at the start of a participant's scratch: addresses of the arrays, then of these; tasks whose
# coefficients and records the participant has made; sums over groups of a backward in parts; whether the caller gave
# the statistics; whether the moments are all that is wanted
(CALL_MEAN, CALL_RSTD, CALL_WORK, CALL_EXPANDED, CALL_PARTS, CALL_RECORDS, CALL_GIVEN, CALL_ONLY) = range(8, 16)
# the ticket that a participant holds, pairs of a first and an end; where it looks for the next one
(TICKET_N, TICKET_BUNDLE, TICKET_CHUNK, TICKET_STEP, CALL_PLACE, CALL_TAKEN) = (16, 18, 20, 22, 23, 24)
# where dweight and dbias go; whether all coefficients that the participant has made are for x itself (`groups.py`)
(CALL_DWEIGHT, CALL_DBIAS, CALL_FOLDED) = (25, 26, 27)
CALL_BYTES = 256

SHORT_ROWS = 64
"""Elements, at least, that rows shorter than a vector are taken together for: three channels are a part of a vector, 66
of them are four and a part.
"""
SUMS = 3
"""Sums that the backward keeps for each channel: of v, of v*t, of t; under a mask also the count."""
FOLDED, FOLDED_SUM = 64, 1024
"""Bytes of a folded vector of float64 lanes, and of one of the sums of 16 channels."""
