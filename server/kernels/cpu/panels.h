// How weights lie in memory: one layout for every number of rows and every variant of the kernels.
//
// A panel holds 32 output channels (rows of a checkpoint's [N, K] matrix), its inputs grouped in units: one float, or
// two of bfloat16. A line is one unit of all 32 channels. Lines of a panel follow each other, panels too, so
// that a product reads one stream from beginning to end. For few rows a line is two vector operands; for many rows 16
// lines are two operands of an AMX tile product. K and V pages have the same layout, so that attention runs on the same
// kernels: K as [tokens, channels], V as [channels, tokens].
#pragma once
#include <algorithm>

#include "simd.h"
#include "step.h"

namespace boomerang {

constexpr int kPanel = 32;      // output channels of a panel
constexpr int kUnitStep = 16;   // units of a panel are a multiple of this, zeros at the end: the depth of a tile

template <class W>
constexpr int kPerUnit = sizeof(W) == 4 ? 1 : 2;  // inputs in a unit
template <class W>
constexpr int kLine = kPanel * kPerUnit<W> * int(sizeof(W));  // bytes of a line

inline int round_up(int n, int step) { return (n + step - 1) / step * step; }
inline int chunks_for(int n, int size) { return (n + size - 1) / size; }

template <class W>
inline int units_of(int K) {
    return round_up((K + kPerUnit<W> - 1) / kPerUnit<W>, kUnitStep);
}
// Inputs of a product padded to whole units: the length of a row of activations.
template <class W>
inline int padded(int K) {
    return units_of<W>(K) * kPerUnit<W>;
}
// Elements between rows of activations: an odd number of cache lines, so that rows do not meet in few sets of a cache.
template <class W, class X>
inline int row_stride(int K) {
    const int line = 64 / int(sizeof(X)), lines = chunks_for(padded<W>(K), line);
    return (lines | 1) * line;
}
inline int panels_of(int N) { return (N + kPanel - 1) / kPanel; }

// Elements from the start of a panelled matrix to input k of channel n.
template <class W>
inline long panel_offset(int n, int k, int units) {
    if (sizeof(W) == 1) {
        // Each 16 bytes of a line hold four channels of the first half and four of the second: as bytes are interleaved to
        // words within 16 bytes, a line widens to its halves without a permutation.
        const int half = n % kPanel / 16, four = n % 16 / 4;
        return (long(n / kPanel) * units + k / 2) * kLine<W> + 16 * four + 8 * half + n % 4 * 2 + k % 2;
    }
    return (long(n / kPanel) * units + k / kPerUnit<W>) * kPanel * kPerUnit<W> + long(n % kPanel) * kPerUnit<W> + k % kPerUnit<W>;
}

// Weights of one product, packed. `scale` (int8 only) has one factor per channel of the panels; what follows it is for
// compressed ones only (compressed.h).
struct Weights {
    const char* data = nullptr;
    int N = 0, K = 0;
    const float* scale = nullptr;
    const uint8_t* exponents = nullptr;
    const int32_t* rest_start = nullptr;
    const BsRest* rest = nullptr;
    int type = 0, rows = 0;  // for Codes: the type, and rows of this part
    const BsWeights* more = nullptr;
    const char* nested = nullptr;
};

// Row of the checkpoint's matrix that is channel n of the panels, -1 for padding. In a gated MLP a panel holds 16 of
// gate and the same 16 of up, so that one block of sums is all that the activation needs.
inline int source_row(int n, int N, bool gated) {
    if (!gated) return n < N ? n : -1;
    const int half = N / 2, i = n / kPanel * 16 + n % 16;
    return i >= half ? -1 : n % kPanel < 16 ? i : half + i;
}
inline int num_panels(int N, bool gated) { return gated ? (N / 2 + 15) / 16 : panels_of(N); }

}  // namespace boomerang
