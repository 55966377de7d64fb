// Attention over K and V in eight bits: integer products within 32 channels or positions, floats between.
//
// K of a page lies as a matrix of Q8_0 does (codes.h), tokens being its channels: a float16 scale per token and 32 channels
// of a head. V lies as one of int8, a head's channels being its own, then comes a float16 scale per token: sums cannot be
// scaled by what they are summed over, so the weights of the softmax are, before they are rounded. Queries are rounded by 32
// channels, weights by 32 positions of a page. A scale that is no number keeps what is none from passing unseen.
#pragma once
#include "attention.h"
#include "codes_block.h"
#include "rows.h"

namespace boomerang {

struct Int8Pages : PageSizes {
    using Keys = Form<8, kHalf, 7>;
    using Values = Form<8, kChannel, 7>;
    using PageSizes::PageSizes;
    int key_groups() const { return padded_dim / kGroup; }     // of a panel of 32 tokens
    int value_groups() const { return padded_size / kGroup; }  // of a panel of 32 channels
    // Of one head. The scales of V stand behind its codes.
    long key_bytes() const { return long(padded_size / kPanel) * key_groups() * Keys::record; }
    long value_scales() const { return long(padded_dim / kPanel) * value_groups() * Values::record; }
    long value_bytes() const { return value_scales() + 2 * padded_size; }
};

#ifdef __AVX512F__
inline uint16_t to_half(float x) { return uint16_t(_mm_cvtsi128_si32(_mm256_castsi256_si128(_mm512_cvtps_ph(_mm512_set1_ps(x), _MM_FROUND_TO_NEAREST_INT)))); }
inline float from_half(uint16_t x) { return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_set1_epi16(short(x)))); }
inline void store_bytes16(uint8_t* p, F16 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x))); }
#elif defined(__aarch64__)
inline uint16_t to_half(float x) {
    const __fp16 half = __fp16(x);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
inline float from_half(uint16_t x) {
    __fp16 half;
    std::memcpy(&half, &x, 2);
    return half;
}
inline void store_bytes16(uint8_t* p, F16 x) {
    int32_t wide[16];
    for (int i = 0; i < 4; i++) vst1q_s32(wide + 4 * i, vcvtnq_s32_f32(x.v[i]));
    for (int i = 0; i < 16; i++) p[i] = uint8_t(wide[i]);
}
#else
inline uint16_t to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
inline float from_half(uint16_t x) { return _cvtsh_ss(x); }
inline void store_bytes16(uint8_t* p, F16 x) {
    alignas(32) int32_t wide[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(wide), _mm256_cvtps_epi32(x.low));
    _mm256_store_si256(reinterpret_cast<__m256i*>(wide) + 1, _mm256_cvtps_epi32(x.high));
    for (int i = 0; i < 16; i++) p[i] = uint8_t(wide[i]);
}
#endif

// The float16 scale of x [n] in eight bits: its largest magnitude / 127.
inline uint16_t scale_of_codes(const float* x, int n) {
    F16 most = zero16(), nothing = zero16();
    for (int i = 0; i < n; i += 16) {
        const F16 v = load16(x + i, tail16(n - i));
        most = max16(most, max16(v, zero16() - v));
        nothing = fma16(v, zero16(), nothing);  // unless one is no finite number, which a maximum may lose
    }
    return to_half(top16(most) / 127.0f + sum16(nothing));
}

// x [n], n <= 32, as codes [32] around 128.
inline void to_codes(const float* x, int n, uint16_t scale, uint8_t* codes) {
    const float wide = from_half(scale);
    std::memset(codes, 128, kGroup);
    if (!(wide > 0.0f)) return;
    for (int i = 0; i < n; i += 16) {
        const F16 code = load16(x + i, tail16(n - i)) / set16(wide);
        store_bytes16(codes + i, max16(min16(code, set16(127.0f)), set16(-127.0f)) + set16(128.0f));
    }
}

// Keys [head_dim] of token `slot` of a page of one head.
inline void write_keys(const Int8Pages& shape, uint8_t* page, int slot, const float* k) {
    const int c = slot % kPanel;
    uint8_t codes[kGroup], *record = page + long(slot / kPanel) * shape.key_groups() * Int8Pages::Keys::record;
    for (int d = 0; d < shape.head_dim; d += kGroup, record += Int8Pages::Keys::record) {
        const int n = std::min(kGroup, shape.head_dim - d);
        const uint16_t scale = scale_of_codes(k + d, n);
        to_codes(k + d, n, scale, codes);
        std::memcpy(record + 2 * c, &scale, 2);
        for (int i = 0; i < kGroupLines; i++) std::memcpy(record + Int8Pages::Keys::scale_bytes + i * 128 + 4 * c, codes + 4 * i, 4);
    }
}

// Values [head_dim] of token `slot`.
inline void write_values(const Int8Pages& shape, uint8_t* page, int slot, const float* v) {
    // Places that hold no token yet have weight zero, so that their scales must be numbers: the first token clears them.
    if (slot == 0) std::memset(page + shape.value_scales(), 0, 2 * shape.padded_size);
    const uint16_t scale = scale_of_codes(v, shape.head_dim);
    std::memcpy(page + shape.value_scales() + 2 * slot, &scale, 2);
    uint8_t codes[kGroup], *line = page + slot / kGroup * Int8Pages::Values::record + slot % kGroup / 4 * 128 + slot % 4;
    for (int d = 0; d < shape.head_dim; d += kPanel, line += long(shape.value_groups()) * Int8Pages::Values::record) {
        to_codes(v + d, std::min(kPanel, shape.head_dim - d), scale, codes);
        for (int c = 0; c < kPanel; c++) line[4 * c] = codes[c];
    }
}

// Groups of a panel one by one; meanwhile `share` bytes for each are fetched from elsewhere.
template <class F>
struct Scattered : Packed<F> {
    const uint8_t* const* records;
    const char* const* ahead;
    Scattered(const uint8_t* const* records, const char* const* ahead) : Packed<F>(reinterpret_cast<const char*>(*records), 0), records(records), ahead(ahead) {}
    void next() { this->record = *++records, ahead++; }
};
struct FetchElsewhere {
    long share;
    template <class Source>
    void group(const Source& from) const {
        for (int i = 0; i < share && *from.ahead; i += 64) prefetch_second(*from.ahead + i);
    }
    template <class Source, int i>
    void line() const {}
};

// sums [R, 32] = R rows from `row` on by a panel of `groups` groups. Not inlined: compiled once for all callers.
template <class F, int R>
__attribute__((noinline)) void scattered_block(const Scattered<F>& from, int groups, const RoundedRows& x, int row, float* sums, long share) {
    constexpr int vectors = kPanel / kLanes;
    if constexpr (R <= kWholePanelRows) {
        code_rows<Scattered<F>, R, 0, vectors>(from, groups, x, row, sums, kPanel, FetchElsewhere{share});
    } else {
        code_rows<Scattered<F>, R, 0, vectors / 2>(from, groups, x, row, sums, kPanel, FetchElsewhere{share});
        code_rows<Scattered<F>, R, vectors / 2, vectors / 2>(from, groups, x, row, sums, kPanel, FetchNothing{});
    }
}

// put(row, rows, sums [rows, 32]) for all rows, in blocks.
template <class F, class Put>
inline void multiply_scattered(const Scattered<F>& from, int groups, const RoundedRows& x, int rows, long share, Put&& put) {
    alignas(64) float sums[kPackedRows * kPanel];
    for (int r = 0, size; r < rows; r += size, share = 0) {
        size = chunks_for(rows - r, chunks_for(rows - r, kPackedRows));
        each_line<1, kPackedRows + 1>([&](auto R) {
            if (R == size) scattered_block<F, R>(from, groups, x, r, sums, share);
        });
        put(r, size, sums);
    }
}

template <class T>
void attend_int8(const AttentionItem<T>& item, const Int8Pages& shape, AttentionScratch<T>& scratch) {
    using Keys = Int8Pages::Keys;
    using Values = Int8Pages::Values;
    const int rows = item.num_tokens * item.group, Dp = shape.padded_dim, Pp = shape.padded_size, D = shape.head_dim;
    const int key_groups = shape.key_groups(), value_groups = shape.value_groups(), key_panels = Pp / kPanel, value_panels = Dp / kPanel;
    const auto *k_pages = reinterpret_cast<const uint8_t*>(item.k_pages), *v_pages = reinterpret_cast<const uint8_t*>(item.v_pages);
    auto keys_of = [&](int32_t number, int head) { return k_pages + (long(number) * shape.num_kv_heads + head) * shape.key_bytes(); };
    auto values_of = [&](int page) { return v_pages + (long(item.table[page]) * shape.num_kv_heads + item.head) * shape.value_bytes(); };
    // What is read next is fetched into the second-level cache; with many queries other items have fetched it.
    const bool fetches = item.num_tokens == 1;
    const int value_share = fetches ? round_up(chunks_for(int(shape.value_bytes()), key_panels * key_groups), 64) : 0;
    const int key_share = fetches ? round_up(chunks_for(int(shape.key_bytes()), value_panels * value_groups), 64) : 0;

    const int ldq = Dp + 64, ldw = kPagesInBlock * Pp + 64, most_groups = std::max(key_groups, kPagesInBlock * value_groups) + 1;
    int8_t *q = scratch.query_codes.at_least(size_t(rows) * ldq), *w = scratch.weight_codes.at_least(size_t(rows) * ldw);
    BlockOfRow *q_blocks = scratch.query_blocks.at_least(size_t(rows) * key_groups), *w_blocks = scratch.weight_blocks.at_least(size_t(rows) * kPagesInBlock * value_groups);
    const uint8_t** records = scratch.records.at_least(most_groups);
    const char** ahead = scratch.ahead.at_least(most_groups);
    float wide[kMostHeadDim];
    for (int r = 0; r < rows; r++) {
        convert_row(item.q + long(r) * Dp, wide, D);
        round_row(wide, D, q + long(r) * ldq, q_blocks + long(r) * key_groups);
    }

    auto scores_of = [&](int page, int pages, float* scores, int columns) {
        for (int i = 0; i < pages; i++) {
            const uint8_t *k = keys_of(item.table[page + i], item.head), *v = values_of(page + i);
            for (int p = 0; p < key_panels; p++) {
                for (int g = 0; g < key_groups; g++) {
                    records[g] = k + long(p * key_groups + g) * Keys::record;
                    ahead[g] = reinterpret_cast<const char*>(v) + long(p * key_groups + g) * value_share;
                }
                records[key_groups] = nullptr, ahead[key_groups] = nullptr;
                multiply_scattered<Keys>({records, ahead}, key_groups, {q, ldq, q_blocks, key_groups}, rows, value_share, [&](int r, int size, const float* sums) {
                    for (int j = 0; j < size; j++) std::memcpy(scores + long(r + j) * columns + i * Pp + p * kPanel, sums + j * kPanel, sizeof(float) * kPanel);
                });
            }
        }
    };
    auto next_keys = [&](int page, int i) -> const uint8_t* {
        const int next = page + kPagesInBlock;
        if (next + i < item.end_page) return keys_of(item.table[next + i], item.head);
        return next >= item.end_page && i < item.num_next ? keys_of(item.next_table[i], item.next_head) : nullptr;
    };
    auto weigh = [&](int page, int pages, float* weights, int columns, float* acc) {
        const int groups = pages * value_groups, ldb = kPagesInBlock * value_groups;
        for (int r = 0; r < rows; r++) {
            float* row = weights + long(r) * columns;
            for (int i = 0; i < pages; i++) {
                const uint8_t* scales = values_of(page + i) + shape.value_scales();
                for (int n = 0; n < Pp; n += kLanes) store_floats(row + i * Pp + n, load_floats(row + i * Pp + n) * load_halves(scales + 2 * n));
            }
            round_row(row, pages * Pp, w + long(r) * ldw, w_blocks + long(r) * ldb);
        }
        for (int p = 0; p < value_panels; p++) {
            for (int i = 0; i < pages; i++) {
                const uint8_t *v = values_of(page + i), *next = fetches ? next_keys(page, i) : nullptr;
                for (int g = 0; g < value_groups; g++) {
                    records[i * value_groups + g] = v + long(p * value_groups + g) * Values::record;
                    ahead[i * value_groups + g] = next ? reinterpret_cast<const char*>(next) + long(p * value_groups + g) * key_share : nullptr;
                }
            }
            records[groups] = nullptr, ahead[groups] = nullptr;
            multiply_scattered<Values>({records, ahead}, groups, {w, ldw, w_blocks, ldb}, rows, key_share, [&](int r, int size, const float* sums) {
                for (int j = 0; j < size; j++)
                    for (int half = 0; half < kPanel; half += 16) {
                        float* to = acc + long(r + j) * Dp + p * kPanel + half;
                        const F16 sum = load16(sums + j * kPanel + half);
                        store16(to, page == item.first_page ? sum : sum + load16(to));
                    }
            });
        }
    };
    attend_over<float>(item, shape, scratch, scores_of, weigh);
}

}  // namespace boomerang
