// Products of rounded activations with codes: integers within a group, floats between groups.
//
// A row is rounded by blocks of 32 inputs: eight bits, a scale, and the sum, which turns centres and minima into one multiply.
#pragma once
#include "buffer.h"
#include "codes.h"
#include "simd.h"

namespace boomerang {

// Of a block of a row: scale, scale * sum of its codes, and minus that sum, of all and of the first 16.
struct BlockOfRow {
    float scale, sum;
    int32_t negative, negative_first;
};

// Rows [M] of K inputs, rounded.
struct RoundedRows {
    const int8_t* codes = nullptr;
    long ldc = 0;
    const BlockOfRow* blocks = nullptr;
    long ldb = 0;
};

#ifndef __aarch64__
// Of 32 inputs times `inverse`.
inline __m256i rounded_block(const float* x, float inverse) {
#ifdef __AVX512F__
    const __m512 factor = _mm512_set1_ps(inverse);
    auto half = [&](int i) { return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), factor))); };
    return _mm256_set_m128i(half(1), half(0));
#else
    const __m256 factor = _mm256_set1_ps(inverse);
    auto eight = [&](int i) { return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), factor)); };
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(eight(0), eight(1)), _mm256_packs_epi32(eight(2), eight(3)));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
#endif
}

// Four blocks at once, whose maxima and sums are found side by side.
inline void round_four(const float* x, int8_t* codes, BlockOfRow* blocks) {
#ifdef __AVX512F__
    __m512 m[4];
    for (int b = 0; b < 4; b++) m[b] = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(x + 32 * b)), _mm512_abs_ps(_mm512_loadu_ps(x + 32 * b + 16)));
    auto pairs = [](__m512 a, __m512 b) { return _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
    const __m512 p = pairs(m[0], m[1]), q = pairs(m[2], m[3]), wide = _mm512_max_ps(_mm512_shuffle_ps(p, q, 0x44), _mm512_shuffle_ps(p, q, 0xee));
    const __m256 both = _mm256_max_ps(_mm512_castps512_ps256(wide), _mm512_extractf32x8_ps(wide, 1));
#else
    __m256 m[4];
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (int b = 0; b < 4; b++) {
        auto eight = [&](int i) { return _mm256_andnot_ps(sign, _mm256_loadu_ps(x + 32 * b + 8 * i)); };
        m[b] = _mm256_max_ps(_mm256_max_ps(eight(0), eight(1)), _mm256_max_ps(eight(2), eight(3)));
    }
    auto pairs = [](__m256 a, __m256 b) { return _mm256_max_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); };
    const __m256 p = pairs(m[0], m[1]), q = pairs(m[2], m[3]), both = _mm256_max_ps(_mm256_shuffle_ps(p, q, 0x44), _mm256_shuffle_ps(p, q, 0xee));
#endif
    const __m128 most = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)), top = _mm_set1_ps(127.0f);
    alignas(16) float inverse[4];
    _mm_store_ps(inverse, _mm_and_ps(_mm_cmpgt_ps(most, _mm_setzero_ps()), _mm_div_ps(top, most)));
    __m256i sums[4];  // by eights of inputs, of codes + 128
    for (int b = 0; b < 4; b++) {
        const __m256i block = rounded_block(x + 32 * b, inverse[b]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 32 * b), block);
        sums[b] = _mm256_sad_epu8(_mm256_xor_si256(block, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
    }
    auto halves = [](__m256i a, __m256i b) { return _mm256_castsi256_ps(_mm256_add_epi64(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b))); };
    const __m256i of_halves = _mm256_castps_si256(_mm256_shuffle_ps(halves(sums[0], sums[1]), halves(sums[2], sums[3]), 0x88)), bias = _mm256_set1_epi32(16 * 128);
    const __m256i negative = _mm256_sub_epi32(bias, of_halves);
    const __m128i first = _mm256_castsi256_si128(negative), all = _mm_add_epi32(first, _mm256_extracti128_si256(negative, 1));
    const __m128 scale = _mm_div_ps(most, top), sum = _mm_mul_ps(scale, _mm_cvtepi32_ps(_mm_sub_epi32(_mm_setzero_si128(), all)));
    __m128 of[4] = {scale, sum, _mm_castsi128_ps(all), _mm_castsi128_ps(first)};
    _MM_TRANSPOSE4_PS(of[0], of[1], of[2], of[3]);
    static_assert(sizeof(BlockOfRow) == 16, "one vector for each block");
    for (int b = 0; b < 4; b++) _mm_storeu_ps(&blocks[b].scale, of[b]);
}
#endif

// x [n] -> codes [32 blocks], blocks.
inline void round_row(const float* x, int n, int8_t* codes, BlockOfRow* blocks) {
    int k = 0;
#ifndef __aarch64__
    for (; k + 4 * kGroup <= n; k += 4 * kGroup, blocks += 4) round_four(x + k, codes + k, blocks);
#endif
    for (; k < n; k += kGroup, blocks++) {
        F16 low, high;
        if (n - k >= kGroup)
            low = load16(x + k), high = load16(x + k + 16);
        else
            low = load16(x + k, tail16(n - k)), high = load16(x + k + 16, tail16(n - k - 16));
        const F16 none = zero16();
        const float most = top16(max16(max16(low, none - low), max16(high, none - high)));
        const F16 inverse = set16(most > 0.0f ? 127.0f / most : 0.0f);
        low = low * inverse, high = high * inverse;
        int sums[2];
#ifdef __AVX512F__
        const __m512i least = _mm512_set1_epi32(-128);  // what is no number converts to the least integer: two would not add
        const __m512i a = _mm512_max_epi32(_mm512_cvtps_epi32(low), least), b = _mm512_max_epi32(_mm512_cvtps_epi32(high), least);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k), _mm512_cvtepi32_epi8(a));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k + 16), _mm512_cvtepi32_epi8(b));
        sums[0] = _mm512_reduce_add_epi32(a), sums[1] = _mm512_reduce_add_epi32(b);
#elif defined(__aarch64__)
        for (int half = 0; half < 2; half++) {
            int32x4_t four[4];
            for (int i = 0; i < 4; i++) four[i] = vcvtnq_s32_f32((half ? high : low).v[i]);
            const int16x8_t first = vcombine_s16(vqmovn_s32(four[0]), vqmovn_s32(four[1])), second = vcombine_s16(vqmovn_s32(four[2]), vqmovn_s32(four[3]));
            vst1q_s8(codes + k + 16 * half, vcombine_s8(vqmovn_s16(first), vqmovn_s16(second)));
            sums[half] = vaddlvq_s16(first) + vaddlvq_s16(second);
        }
#else
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        const __m256i a = _mm256_packs_epi32(_mm256_cvtps_epi32(low.low), _mm256_cvtps_epi32(low.high));
        const __m256i b = _mm256_packs_epi32(_mm256_cvtps_epi32(high.low), _mm256_cvtps_epi32(high.high));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + k), _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), order));
        auto total = [](__m256i words) {
            const __m256i pairs = _mm256_madd_epi16(words, _mm256_set1_epi16(1));
            __m128i s = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
            s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
            return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
        };
        sums[0] = total(a), sums[1] = total(b);
#endif
        const float scale = most / 127.0f;
        *blocks = {scale, scale * float(sums[0] + sums[1]), -(sums[0] + sums[1]), -sums[0]};
    }
}

// Lines whose products fit 16 bits: codes of `bits` bits by -127 to 127.
template <int bits>
constexpr int kLinesInWords = bits == 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1;

// What is fetched while a block runs, spread out: a burst of prefetches holds up the loads behind it.
//
// Of what the next block reads: `share` bytes a group from `next` on, up to `end`, into the second-level cache.
struct FetchNext {
    const char *next = nullptr, *end = nullptr;
    long share = 0;
    template <class Source>
    void group(const Source&) {
        for (const char* stop = std::min(next + share, end); next < stop; next += 64) prefetch_second(next);
    }
    template <class Source, int i>
    void line() const {}
};
// What the same block, or the one after it, reads `bytes` later. What would lie from `end` on lies `jump` further.
struct FetchLater {
    long bytes;
    const char* end;
    long jump;
    const char* at = nullptr;
    template <class Source>
    void group(const Source& from) {
        at = reinterpret_cast<const char*>(from.here()) + bytes;
        at += at < end ? 0 : jump;
        for (int i = Source::Form::record / 64 / kGroupLines * kGroupLines * 64; i < Source::Form::record; i += 64) prefetch_once(at + i);
    }
    template <class Source, int i>
    __attribute__((always_inline)) void line() const {  // GCC drops calls of a function that does nothing but prefetch
        constexpr int each = Source::Form::record / 64 / kGroupLines;
        for (int n = 0; n < each; n++) prefetch_once(at + (i * each + n) * 64);
    }
};
struct FetchNothing {
    template <class Source>
    void group(const Source&) const {}
    template <class Source, int i>
    void line() const {}
};

// GCC makes functions of the bodies below, whose sums then lie in memory, and adds sums of 16 bits as trees, for which it
// keeps every product on the stack: together 1.7 times the time of a block of four bits. So bodies are inlined and sums are
// added `in_this_order`. Where one instruction adds four products neither happens, and its choice is 4 % faster.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
#define BS_INLINED
#else
#define BS_INLINED __attribute__((always_inline))
#endif

// R rows from row `x` on by V vectors of channels from vector v0 on of a panel: out [R, ld] of floats.
template <class Source, int R, int v0, int V, class Fetch>
inline void code_rows(Source from, int groups, const RoundedRows& x, int row, float* out, long ld, Fetch ahead) {
    using F = typename Source::Form;
    constexpr bool is_signed = (kSignedBytes || !kFours) && F::bits == 8 && F::centre >= 0;  // then codes are taken as they are meant, without their centre of 128
    constexpr int part_lines = kGroupLines / F::parts;
    Floats total[R][V];
    const int8_t* codes = x.codes + row * x.ldc;
    const BlockOfRow* blocks = x.blocks + row * x.ldb;
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) total[r][v] = no_floats();
    for (int g = 0; g < groups; g++, from.next(), codes += kGroup, blocks++) {
        ahead.group(from);
        typename Source::Lower low[V];
        each_line<0, V>([&](auto v) BS_INLINED { low[v] = from.template lower<v0 + v>(); });
        each_line<0, F::parts>([&](auto part) BS_INLINED {
            Bytes sum[R][V];
            for (int r = 0; r < R; r++) {
                Bytes start = zero_bytes();
                if constexpr (F::centre >= 0 && !is_signed) {
                    const BlockOfRow& block = blocks[r * x.ldb];
                    const Bytes all = every_four(block.negative), first = every_four(block.negative_first);
                    start = times_power<(F::centre >= 0 ? F::centre : 0)>(F::parts == 1 ? all : part == 0 ? first : minus32(all, first));
                }
                for (int v = 0; v < V; v++) sum[r][v] = start;
            }
            if constexpr (kFours) {
                each_line<part * part_lines, (part + 1) * part_lines>([&](auto i) BS_INLINED {
                    ahead.template line<Source, i>();
                    Bytes w[V];
                    each_line<0, V>([&](auto v) BS_INLINED {
                        w[v] = from.template code<i, v0 + v>(low[v]);
                        if constexpr (is_signed) w[v] = flip(w[v], every_byte(0x80));
                    });
                    for (int r = 0; r < R; r++) {
                        int32_t four;
                        std::memcpy(&four, codes + r * x.ldc + 4 * i, 4);
                        const Bytes of = every_four(four);
                        for (int v = 0; v < V; v++) sum[r][v] = add_fours(sum[r][v], w[v], of);
                    }
                });
            } else {
                constexpr int lines = kLinesInWords<F::bits> < part_lines ? kLinesInWords<F::bits> : part_lines;
                each_line<0, part_lines / lines>([&](auto turn) BS_INLINED {
                    Bytes words[R][V];
                    each_line<0, lines>([&](auto l) BS_INLINED {
                        constexpr int i = part * part_lines + turn * lines + l;
                        ahead.template line<Source, i>();
                        Bytes w[V];
                        each_line<0, V>([&](auto v) BS_INLINED {
                            w[v] = from.template code<i, v0 + v>(low[v]);
                            if constexpr (is_signed) w[v] = flip(w[v], every_byte(0x80));
                        });
                        for (int r = 0; r < R; r++) {
                            int32_t four;
                            std::memcpy(&four, codes + r * x.ldc + 4 * i, 4);
                            const Bytes of = every_four(four);
                            for (int v = 0; v < V; v++) {
                                const Bytes products = is_signed ? pair_products(magnitude(w[v]), with_sign_of(of, w[v])) : pair_products(w[v], of);
                                words[r][v] = l == 0 ? products : plus16(words[r][v], products);
                                in_this_order(words[r][v]);
                            }
                        }
                    });
                    for (int r = 0; r < R; r++)
                        for (int v = 0; v < V; v++) {
                            sum[r][v] = plus32(sum[r][v], sum_pairs(words[r][v]));
                            in_this_order(sum[r][v]);
                        }
                });
            }
            Floats scale[V], minimum[V];
            for (int v = 0; v < V; v++) {
                scale[v] = from.scale(part, v0 + v);
                minimum[v] = from.minimum(part, v0 + v);
            }
            for (int r = 0; r < R; r++) {
                const BlockOfRow& block = blocks[r * x.ldb];
                const Floats factor = every_float(block.scale);
                for (int v = 0; v < V; v++) {
                    if constexpr (F::scales == kChannel)
                        total[r][v] = fused(to_floats(sum[r][v]), factor, total[r][v]);
                    else
                        total[r][v] = fused(to_floats(sum[r][v]) * factor, scale[v], total[r][v]);
                }
                if constexpr (F::has_minimum) {
                    const float of = F::parts == 1 ? block.sum : -block.scale * float(part == 0 ? block.negative_first : block.negative - block.negative_first);
                    for (int v = 0; v < V; v++) total[r][v] = fused(minimum[v], every_float(of), total[r][v]);
                }
            }
        });
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store_floats(out + r * ld + (v0 + v) * kLanes, total[r][v]);
}

#ifdef __AVX512F__
constexpr int kCodeRows = 6, kWholePanelRows = 6, kPackedRows = 6;  // sums and totals of more do not fit into 32 registers
// So many rows read codes as they lie, in blocks of up to kPackedRows, each of which unpacks them again; with more a panel is
// widened once for all of them. Measured, by the number of planes that a code is put together from.
template <class F>
constexpr int kMostPackedRows = F::bits == 8 && F::scales != kNested ? 1 << 30 : F::bits == 4 ? 48 : F::bits == 5 ? 32 : 8;
#else
constexpr int kCodeRows = 4, kWholePanelRows = 1, kPackedRows = 2;  // sixteen registers
template <class F>
constexpr int kMostPackedRows = kFours ? kPackedRows : F::bits == 8 && F::scales != kNested ? 6 : F::bits == 4 ? 4 : kPackedRows;
#endif

template <class Source, int R, class Fetch>
void code_block(const char* panel, int groups, const RoundedRows& x, int row, float* sums, const Fetch& ahead) {
    constexpr int vectors = kPanel / kLanes;
    const Source from(panel, groups);
    if constexpr (R <= kWholePanelRows) {
        code_rows<Source, R, 0, vectors>(from, groups, x, row, sums, kPanel, ahead);
    } else {
        code_rows<Source, R, 0, vectors / 2>(from, groups, x, row, sums, kPanel, ahead);
        code_rows<Source, R, vectors / 2, vectors / 2>(from, groups, x, row, sums, kPanel, FetchNothing{});
    }
}

// A row's sums are the same whatever rows are with it.
template <class Fetch>
using CodeBlock = void (*)(const char* panel, int groups, const RoundedRows& x, int row, float* sums, const Fetch& ahead);

// What is done with codes of one type.
struct CodeKernels {
    long (*panel_bytes)(int groups);
    long (*first)(int groups), (*reach)(int groups);  // of those, where what a product reads begins and ends
    long wide_record;  // bytes of a group of a widened panel
    void (*widen)(const char* panel, int groups, uint8_t* to);
    void (*to_floats)(const uint8_t* widened, int groups, float* to);
    int most_packed;
    CodeBlock<FetchNext> packed[kPackedRows], widened[kCodeRows];  // by rows - 1
    CodeBlock<FetchLater> alone[kPackedRows];                      // where all rows are one block; null for codes of many streams
};

// Channels of a widened panel as floats, one line of 32 per input (what a panel of floats is).
template <class F>
void widened_to_floats(const uint8_t* lines, int groups, float* to) {
    for (int g = 0; g < groups; g++, lines += Widened<F>::kRecord) {
        const float* floats = reinterpret_cast<const float*>(lines + 1024);
        for (int k = 0; k < kGroup; k++, to += kPanel) {
            const int part = F::parts == 1 ? 0 : k / 16;
            for (int c = 0; c < kPanel; c++) {
                const int code = lines[(2 * (k / 4) + c / 16) * 64 + c % 16 * 4 + k % 4] - (F::centre < 0 ? 0 : 1 << std::max(F::centre, 0));
                to[c] = F::scales == kChannel ? float(code) : float(code) * floats[part * kPanel + c] + (F::has_minimum ? floats[(F::parts + part) * kPanel + c] : 0.0f);
            }
        }
    }
}

template <class F>
constexpr CodeKernels code_kernels() {
    using W = WideForm<F>;
    CodeKernels all = {[](int groups) { return F::panel_bytes(groups); }, Packed<F>::first, Packed<F>::reach, Widened<W>::kRecord, widen_codes<F>, widened_to_floats<W>, kMostPackedRows<F>, {}, {}, {}};
    each_line<0, kPackedRows>([&](auto i) {
        all.packed[i] = code_block<Packed<F>, i + 1, FetchNext>;
        if constexpr (F::scales != kNested) all.alone[i] = code_block<Packed<F>, i + 1, FetchLater>;
    });
    each_line<0, kCodeRows>([&](auto i) {
        all.widened[i] = code_block<Widened<W>, i + 1, FetchNext>;
    });
    return all;
}

// Not a static of a function: those are one for all libraries of a process, and several variants may be loaded in tests.
namespace {
template <class F>
constexpr CodeKernels kKernelsOf = code_kernels<F>();
}

// Null for a type that is none of codes.
inline const CodeKernels* code_kernels_of(int type) {
    const CodeKernels* found = nullptr;
    with_form(type, [&](auto form) { found = &kKernelsOf<decltype(form)>; });
    return found;
}

// Rows that read codes of one form.
struct CodedRun {
    const CodeKernels* kernels;
    int row0, row1;
    int num_rows() const { return row1 - row0; }
    bool is_widened() const { return num_rows() > kernels->most_packed; }
    int num_blocks() const { return chunks_for(num_rows(), is_widened() ? kCodeRows : kPackedRows); }
};

// sink(row, rows, panel, sums [rows, 32]) for the rows of all runs by panels [panel0, panel1) of [.., K] from `data` on. All
// runs have the same panels, each reads what its form has of them: what two have in common comes from memory once. `alone`: as
// of a Part. `then`: what is read after these panels, or null for what follows in memory.
template <class Sink>
void multiply_codes(const CodedRun* runs, int num_runs, const RoundedRows& x, const char* data, int K, int panel0, int panel1, bool alone, const char* then, Sink&& sink) {
    const int groups = groups_of(K);
    const long panel_bytes = runs->kernels->panel_bytes(groups);
    const char* end = data + panel1 * panel_bytes;
    alignas(64) float sums[kCodeRows * kPanel];
    if (alone && num_runs == 1 && runs->num_blocks() == 1 && !runs->is_widened() && runs->kernels->alone[0]) {
        const FetchLater ahead = {kAhead, end, then ? then - end : 0};
        for (int p = panel0; p < panel1; p++) {
            runs->kernels->alone[runs->num_rows() - 1](data + p * panel_bytes, groups, x, runs->row0, sums, ahead);
            sink(runs->row0, runs->num_rows(), p, sums);
        }
        return;
    }
    long first = panel_bytes, reach = 0;
    int blocks = 0;
    for (const CodedRun* run = runs; run != runs + num_runs; run++) {
        first = std::min(first, run->kernels->first(groups)), reach = std::max(reach, run->kernels->reach(groups));
        blocks += run->num_blocks();
    }
    const long share = round_up(chunks_for(int(reach - first), blocks * groups), 64);
    static thread_local Buffer<uint8_t> wide;
    for (int p = panel0; p < panel1; p++) {
        const char *packed = data + p * panel_bytes, *next = p + 1 == panel1 && then ? then : packed + panel_bytes;
        FetchNext ahead = {next + first, next + reach, share};  // each block fetches its share of the next panel
        for (const CodedRun* run = runs; run != runs + num_runs; run++) {
            const CodeKernels& kernels = *run->kernels;
            const char* panel = packed;
            if (run->is_widened()) {
                uint8_t* lines = wide.at_least(groups * kernels.wide_record);
                kernels.widen(packed, groups, lines);
                panel = reinterpret_cast<const char*>(lines);
            }
            const int num = run->num_blocks();
            for (int b = 0, m = run->row0, count; b < num; b++, m += count, ahead.next += share * groups) {
                count = chunks_for(run->row1 - m, num - b);
                (run->is_widened() ? kernels.widened : kernels.packed)[count - 1](panel, groups, x, m, sums, ahead);
                sink(m, count, p, sums);
            }
        }
    }
}

}  // namespace boomerang
