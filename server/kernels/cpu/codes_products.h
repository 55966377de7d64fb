// Products with matrices of codes, each of a type of its own; included by products.h.
#pragma once
#include <vector>

#include "products.h"

namespace boomerang {

// Codes as floats times rows as they are: what the integer kernels are compared with.
inline void multiply_exactly(const CodeKernels& kernels, const Rows<Codes>& x, const char* data, int K, const Part& part, const AnySink& sink) {
    const int groups = groups_of(K);
    static thread_local Buffer<uint8_t> wide;
    static thread_local Buffer<float> floats;
    uint8_t* lines = wide.at_least(groups * kernels.wide_record);
    float* panel = floats.at_least(size_t(groups) * kGroup * kPanel);
    alignas(64) float sums[kBlockRows<float> * kPanel];
    TileState tiles;
    for (int p = part.panel0; p < part.panel1; p++) {
        kernels.widen(data + p * kernels.panel_bytes(groups), groups, lines);
        kernels.to_floats(lines, groups, panel);
        for (int m = part.row0, rows; m < part.row1; m += rows) {
            rows = block_size<float>(part.row1 - m);
            const Term<float> term = {x.x + m * x.ldx, x.ldx, reinterpret_cast<const char*>(panel), groups * kGroup};
            block<false>(&term, 1, rows, sums, kPanel, tiles);
            sink(m, rows, p, sums);
        }
    }
}

#ifdef __AMX_BF16__
// int8 is exact in bfloat16, and tiles multiply bfloat16 faster than vectors do integers. From so many rows; not measured.
constexpr int kTileCodeRows = 16;

// A panel of int8 as one of bfloat16.
inline void widen_int8(const char* panel, int groups, char* to) {
    Packed<Form<8, kChannel, 7>> from(panel, groups);
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
    for (int g = 0; g < groups; g++, from.next())
        each_line<0, kGroupLines>([&](auto i) {
            each_line<0, 2>([&](auto half) {
                const __m512i codes = flip(from.template code<i, half>(), every_byte(0x80));
                each_line<0, 2>([&](auto pair) {
                    const __m512 even = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(codes, 24 - 16 * pair), 24));
                    const __m512 odd = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(codes, 16 - 16 * pair), 24));
                    const __m512i both = _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16), _mm512_and_si512(_mm512_castps_si512(odd), upper));
                    _mm512_storeu_si512(to + (g * kGroup / 2 + 2 * i + pair) * long(kLine<bf16>) + half * 64, both);
                });
            });
        });
}

inline void multiply_in_tiles(const Rows<Codes>& x, const char* data, int K, const Part& part, const AnySink& sink) {
    const int groups = groups_of(K), units = groups * kGroup / kPerUnit<bf16>;
    const long panel_bytes = Form<8, kChannel, 7>::panel_bytes(groups);
    static thread_local Buffer<bf16> wide;
    char* panel = reinterpret_cast<char*>(wide.at_least(size_t(units) * kLineWeights));
    alignas(64) float sums[kBlockRows<bf16> * kPanel];
    TileState tiles;
    for (int p = part.panel0; p < part.panel1; p++) {
        widen_int8(data + p * panel_bytes, groups, panel);
        for (int m = part.row0, rows; m < part.row1; m += rows) {
            rows = block_size<bf16>(part.row1 - m);
            const Term<bf16> term = {x.plain + m * x.ld_plain, x.ld_plain, panel, units};
            block<false>(&term, 1, rows, sums, kPanel, tiles);
            sink(m, rows, p, sums);
        }
    }
}
#endif

// `w` and the parts below it, whose panels are counted through.
inline void multiply_one_form(const Rows<Codes>& x, Weights w, Part part, AnySink sink) {
    for (int before = 0;;) {
        const int here = w.more ? panels_of(w.rows) : part.panel1, last = std::min(part.panel1, here);
        auto shifted = [&](int m, int rows, int panel, float* sums) { sink(m, rows, panel + before, sums); };
        const AnySink one = {&shifted, [](void* context, int m, int rows, int panel, float* sums) { (*static_cast<decltype(shifted)*>(context))(m, rows, panel, sums); }};
        if (part.panel0 < last) {
            Part mine = part;
            mine.panel1 = last;
            if (last < part.panel1) mine.then = nullptr;
            const CodeKernels* kernels = code_kernels_of(w.type);
            if (kernels && x.exact)
                multiply_exactly(*kernels, x, w.data, w.K, mine, one);
#ifdef __AMX_BF16__
            else if (w.type == BS_INT8 && x.plain && !x.in_registers && part.row1 - part.row0 >= kTileCodeRows)
                multiply_in_tiles(x, w.data, w.K, mine, one);
#endif
            else if (kernels) {
                const CodedRun all = {kernels, part.row0, part.row1};
                multiply_codes(&all, 1, x.rounded, w.data, w.K, mine.panel0, last, mine.alone, mine.then, one);
            } else {
                const Rows<bf16> plain = {x.plain, x.ld_plain, x.M, x.in_registers};
                if (w.type == BS_FLOAT) multiply_panels<float>({x.x, x.ldx, x.M}, w, mine, one);
                if (w.type == BS_BF16) multiply_panels<bf16>(plain, w, mine, one);
                if (w.type == BS_BF12) multiply_panels<bf12>({x.plain, x.ld_plain, x.M, x.in_registers}, w, mine, one);
            }
        }
        if (!w.more || part.panel1 <= here) return;
        before += here;
        part.panel0 = std::max(part.panel0 - here, 0), part.panel1 -= here;
        const BsWeights& next = *w.more;
        w = {static_cast<const char*>(next.data), w.N, w.K, next.scale, next.exponents, next.rest_start, next.rest, next.type, next.rows, next.more};
    }
}

// Runs of rows of one copy of the weights go panel by panel together: what they have in common comes from memory once. The
// weights as loaded and their nested codes have nothing in common.
inline void multiply_parts(const Rows<Codes>& x, Weights w, Part part, AnySink sink) {
    if (!w.nested || !x.widths) return multiply_one_form(x, w, part, sink);
    static thread_local std::vector<CodedRun> runs;
    runs.clear();
    auto each_run = [&](bool as_loaded, auto&& body) {
        for (int m = part.row0, end; m < part.row1; m = end) {
            const int width = x.widths[m];
            end = int(std::find_if(x.widths + m, x.widths + part.row1, [&](uint8_t other) { return other != width; }) - x.widths);
            if (as_loaded == (width == BS_EXACT)) body(m, end, width == 8 ? BS_NESTED_8 : BS_NESTED_4 + width - 4);
        }
    };
    int as_loaded = 0;
    each_run(true, [&](int, int, int) { as_loaded++; });
    each_run(false, [&](int m, int end, int type) { runs.push_back({code_kernels_of(type), m, end}); });
    const int panels = as_loaded == 1 ? part.panel1 - part.panel0 : 1;
    for (int p = part.panel0; as_loaded && p < part.panel1; p += panels)
        each_run(true, [&](int m, int end, int) { multiply_one_form(x, w, {m, end, p, p + panels, 0, 0, p + panels == part.panel1 ? part.then : nullptr, nullptr, as_loaded == 1 && runs.empty()}, sink); });
    if (x.exact)
        each_run(false, [&](int m, int end, int type) {
            multiply_one_form(x, {w.nested, w.N, w.K, nullptr, nullptr, nullptr, nullptr, type}, {m, end, part.panel0, part.panel1}, sink);
        });
    else if (!runs.empty())
        multiply_codes(runs.data(), int(runs.size()), x.rounded, w.nested, w.K, part.panel0, part.panel1, !as_loaded, part.then_nested, sink);
}

}  // namespace boomerang
