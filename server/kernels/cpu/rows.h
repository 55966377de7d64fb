// What is done to single rows of float between products: norms and rotary embedding.
#pragma once
#include "simd.h"

namespace boomerang {

// RMSNorm, or LayerNorm if `centred`, of one row of n; statistics in float32. T: type of weight and bias (or null).
template <class T, class Out>
inline void norm_row(const float* x, Out* y, const T* weight, const T* bias, int n, float eps, bool centred) {
    F16 mean = zero16(), squares = zero16();
    if (centred) {
        for (int i = 0; i < n; i += 16) mean = mean + load16(x + i, tail16(n - i));
        mean = set16(sum16(mean) / n);
    }
    for (int i = 0; i < n; i += 16) {
        const F16 d = keep16(tail16(n - i), load16(x + i, tail16(n - i)) - mean);
        squares = fma16(d, d, squares);
    }
    const F16 factor = set16(1.0f / std::sqrt(sum16(squares) / n + eps));
    for (int i = 0; i < n; i += 16) {
        const Mask mask = tail16(n - i);
        F16 v = (load16(x + i, mask) - mean) * factor * load16(weight + i, mask);
        if (bias) v = v + load16(bias + i, mask);
        store16(y + i, v, mask);
    }
}

// Halves convention: channel i turns with channel i + half.
inline void rotate_row(float* x, const float* cos, const float* sin, int half) {
    for (int i = 0; i < half; i += 16) {
        const Mask mask = tail16(half - i);
        const F16 c = load16(cos + i, mask), s = load16(sin + i, mask), a = load16(x + i, mask), b = load16(x + half + i, mask);
        store16(x + i, a * c - b * s, mask);
        store16(x + half + i, fma16(b, c, a * s), mask);
    }
}

template <class In, class Out>
inline void convert_row(const In* from, Out* to, int n) {
    for (int i = 0; i < n; i += 16) store16(to + i, load16(from + i, tail16(n - i)), tail16(n - i));
}

}  // namespace boomerang
