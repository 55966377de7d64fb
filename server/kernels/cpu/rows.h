// What is done to single rows of float between products: norms and rotary embedding.
#pragma once
#include "simd.h"

namespace boomerang {

// body(first, mask) for sixteen values at a time.
template <class Body>
inline void by_sixteen(int n, Body&& body) {
    int i = 0;
    for (; i + 16 <= n; i += 16) body(i, tail16(16));
    if (i < n) body(i, tail16(n - i));
}

// RMSNorm, or LayerNorm if `centred`, of one row of n, to y or added to it; statistics in float32. T: type of weight and
// bias (or null).
template <bool add = false, class T, class Out>
inline void norm_row(const float* x, Out* y, const T* weight, const T* bias, int n, float eps, bool centred, float offset = 0.0f) {
    F16 mean = zero16();
    if (centred) {
        by_sixteen(n, [&](int i, Mask mask) { mean = mean + load16(x + i, mask); });
        mean = set16(sum16(mean) / n);
    }
    F16 squares[4] = {zero16(), zero16(), zero16(), zero16()};  // sums on their way at once
    int whole = 0;
    for (; whole + 64 <= n; whole += 64)
        for (int j = 0; j < 4; j++) {
            const F16 d = load16(x + whole + 16 * j) - mean;
            squares[j] = fma16(d, d, squares[j]);
        }
    by_sixteen(n - whole, [&](int i, Mask mask) {
        const F16 d = keep16(mask, load16(x + whole + i, mask) - mean);
        squares[0] = fma16(d, d, squares[0]);
    });
    const F16 factor = set16(1.0f / std::sqrt(sum16((squares[0] + squares[1]) + (squares[2] + squares[3])) / n + eps));
    by_sixteen(n, [&](int i, Mask mask) {
        F16 v = (load16(x + i, mask) - mean) * factor * (load16(weight + i, mask) + set16(offset));
        if (bias) v = v + load16(bias + i, mask);
        if constexpr (add) v = v + load16(y + i, mask);
        store16(y + i, v, mask);
    });
}

// Rotary embedding of x [n] to y. Halves convention: of the first 2 * half channels i turns with i + half.
template <class Out>
inline void rotate_row(const float* x, Out* y, const float* cos, const float* sin, int half, int n) {
    by_sixteen(half, [&](int i, Mask mask) {
        const F16 c = load16(cos + i, mask), s = load16(sin + i, mask), a = load16(x + i, mask), b = load16(x + half + i, mask);
        store16(y + i, a * c - b * s, mask);
        store16(y + half + i, fma16(b, c, a * s), mask);
    });
    by_sixteen(n - 2 * half, [&](int i, Mask mask) { store16(y + 2 * half + i, load16(x + 2 * half + i, mask), mask); });
}

template <class In, class Out>
inline void convert_row(const In* from, Out* to, int n) {
    for (int i = 0; i < n; i += 16) store16(to + i, load16(from + i, tail16(n - i)), tail16(n - i));
}

}  // namespace boomerang
