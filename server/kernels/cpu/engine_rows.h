// Layers of many rows. What lies between two attentions needs no other rows, so that it runs chunk by chunk: the end of
// one layer and the beginning of the next, with scratch of the thread. Only the hidden state, queries, keys and values
// leave its caches, and threads meet twice per layer.
#pragma once
#include "engine.h"

namespace boomerang {

// Rows of a chunk: weights are read once for it, and what is used again of its rows should fit into the second-level cache.
constexpr int kFewestRows = 256, kMostRows = 512;
constexpr long kChunkBytes = 2400 << 10;

template <class T, class W>
void Engine<T, W>::run_program() {
    auto segment = [&](int i) {
        const int32_t* s = step_->program + 5 * i;
        return Segment{s[0], s[1], s[2], s[3], s[4]};
    };
    const int E = s_.hidden, F = s_.intermediate;
    bool has_begun = false;  // the segment: its queries, keys and values are placed
    const int32_t *save = step_->saves, *last_save = save + 3 * step_->num_saves;
    for (int i = 0; i < step_->num_segments; i++) {
        for (; save != last_save && save[0] == i; save += 3) {
            const float* from = hidden_.data() + long(save[1]) * stream_ld();
            std::copy(from, from + s_.hidden, step_->states + long(save[2]) * s_.hidden);
        }
        const Segment now = segment(i);
        if (!by_rows(now)) {
            const Segment next = i + 1 < step_->num_segments ? segment(i + 1) : Segment{};
            layer(now, first_product(i + 1 < step_->num_segments ? &next : nullptr));
            continue;
        }
        const int first = step_->query_start[now.first];
        // Norm, first product, and placing, of rows [from, to).
        auto begin = [&](const Segment& of, const float* const* biases, int from, int to, RowScratch& scratch, auto&& lap) {
            const BsLayer& w = layers_[of.layer];
            X* normed = scratch.normed.at_least(size_t(to - from) * hidden_ld());
            for (int t = from; t < to; t++) norm(hidden_.data() + long(t) * stream_ld(), normed + long(t - from) * hidden_ld(), w.attn_norm_w, w.attn_norm_b, E);
            const Rows<W> x = prepared(normed, hidden_ld(), to - from, E, scratch.rounded, widths_from(from), true);
            lap(kNorm);
            // Head by head, or as few as fill panels, so that what is placed is still in a cache.
            for (int h = 0, heads; h < all_heads(); h += heads) {
                heads = heads_at_once(h);
                const int column = h * s_.head_dim, width = heads * s_.head_dim, ld = row_stride<float, float>(width);
                float* qkv = scratch.qkv.at_least(size_t(to - from) * ld);
                product_part<false>(x, from_panel(w.qkv, column / kPanel, E), width, E, biases[0] ? biases[0] + column : nullptr, qkv, ld,
                                    {0, to - from, 0, panels_of(width)});
                lap(kProduct);
                place_heads(of.layer, w, from, to, first, h, h + heads, qkv, ld);
                lap(kPlace);
            }
        };
        // Output product, norm and MLP.
        auto end = [&](const Segment& of, const float* const* biases, int from, int to, RowScratch& scratch, auto&& lap) {
            const BsLayer& w = layers_[of.layer];
            const int M = to - from;
            X* normed = scratch.normed.at_least(size_t(M) * hidden_ld());
            float* hidden = hidden_.data() + long(from) * stream_ld();
            auto norm_rows = [&](const void* weight, const void* bias) {
                for (int m = 0; m < M; m++) norm(hidden + long(m) * stream_ld(), normed + long(m) * hidden_ld(), weight, bias, E);
                lap(kNorm);
            };
            if (s_.parallel_residual) norm_rows(w.mlp_norm_w, w.mlp_norm_b);
            float* to_add = before_norm(w.post_attn_norm_w, hidden, M, scratch.post);
            product_part<true>(prepared(attended_.data() + long(from) * attended_ld(), attended_ld(), M, q_width(), scratch.rounded, widths_from(from), true), w.o, E, q_width(), biases[1], to_add, stream_ld(), {0, M, 0, panels_of(E)});
            lap(kProduct);
            add_normed(to_add, hidden, w.post_attn_norm_w, 0, M);
            if (!s_.parallel_residual) norm_rows(w.mlp_norm_w, w.mlp_norm_b);
            const Rows<W> x = prepared(normed, hidden_ld(), M, E, scratch.rounded, widths_from(from), true);
            to_add = before_norm(w.post_mlp_norm_w, hidden, M, scratch.post);
            if constexpr (kCoded) {
                X* act = scratch.act.at_least(size_t(M) * act_ld());
                mlp_up_part(w, x, biases[2], act, act_ld(), nullptr, 0, {0, M, 0, num_panels(up_width(), s_.gated)});
                product_part<true>(prepared(act, act_ld(), M, F, scratch.rounded_act, widths_from(from), true), w.down, E, F, biases[3], to_add, stream_ld(), {0, M, 0, panels_of(E)});
                lap(kProduct);
                add_normed(to_add, hidden, w.post_mlp_norm_w, 0, M);
                return;
            }
            // In pieces of the MLP's width, so that activations do not drive the hidden state out of the cache.
            const int units = units_of<W>(F), piece = mlp_piece(w), width = s_.gated ? 16 : kPanel, per_panel = width / kPerUnit<W>;
            const int up_panels = num_panels(up_width(), s_.gated), act_ld = mlp_ld(w);
            X* act = scratch.act.at_least(size_t(M) * act_ld);
            for (int u = 0; u < units; u += piece) {
                const int stop = std::min(units, u + piece), p0 = u / per_panel, p1 = std::min(up_panels, chunks_for(stop, per_panel));
                mlp_up_part(w, x, biases[2], act, act_ld, nullptr, 0, {0, M, p0, p1, 0, 0, static_cast<const char*>(w.down.data) + u * long(kLine<W>)}, p0);
                for (int m = 0, written = (p1 - p0) * width, wanted = (stop - u) * kPerUnit<W>; written < wanted && m < M; m++)
                    std::fill(act + long(m) * act_ld + written, act + long(m) * act_ld + wanted, X{});
                const auto* then = static_cast<const char*>(stop < units ? from_panel(w.up, p1, E).data : from_panel(w.down, panels_of(E), F).data);
                product_part<true>({act, act_ld, M}, w.down, E, F, biases[3], to_add, stream_ld(), {0, M, 0, panels_of(E), u, stop, then});
            }
            lap(kProduct);
            add_normed(to_add, hidden, w.post_mlp_norm_w, 0, M);
        };
        const float* biases[4];
        if (!has_begun) {
            find_requests(now.first, now.end);
            widen_biases(layers_[now.layer], biases);
            in_chunks(now, [&](int from, int to, RowScratch& scratch, auto&& lap) { begin(now, biases, from, to, scratch, lap); });
        }
        attention(now.layer, layers_[now.layer], now.first, now.end);
        widen_biases(layers_[now.layer], biases);
        const Segment next = i + 1 < step_->num_segments ? segment(i + 1) : Segment{};
        has_begun = next.first == now.first && next.end == now.end && by_rows(next);
        if (has_begun) biases[0] = widen(layers_[next.layer].qkv_b, qkv_width(), false, 0);
        in_chunks(now, [&](int from, int to, RowScratch& scratch, auto&& lap) {
            end(now, biases, from, to, scratch, lap);
            if (has_begun) begin(next, biases, from, to, scratch, lap);
        });
    }
}

// Differences take the other way: their products are split by panels.
template <class T, class W>
bool Engine<T, W>::by_rows(const Segment& segment) const {
    return segment.split == segment.end && step_->query_start[segment.end] - step_->query_start[segment.first] >= kRowsPerThread * pool_.num_threads();
}

// Units of an MLP's width that are computed and used at a time: what the depth of the down product is cut into anyway.
template <class T, class W>
int Engine<T, W>::mlp_piece(const BsLayer& w) const {
    const int units = units_of<W>(s_.intermediate);
    return kHasTiles<W> && !w.down_b && !w.down.scale && s_.hidden % kPanel == 0 ? piece_of(units) : units;
}

// How many heads from `h` on fill whole panels.
template <class T, class W>
int Engine<T, W>::heads_at_once(int h) const {
    if (s_.wide_qk_norm) return all_heads();
    int heads = 1;
    while (heads * s_.head_dim % kPanel && h + heads < all_heads()) heads++;
    return heads;
}

template <class T, class W>
void Engine<T, W>::widen_biases(const BsLayer& w, const float** biases) {
    biases[0] = widen(w.qkv_b, qkv_width(), false, 0);
    biases[1] = widen(w.o_b, s_.hidden, false, 1);
    biases[2] = widen(w.up_b, up_width(), s_.gated, 2);
    biases[3] = widen(w.down_b, s_.hidden, false, 3);
}

// body(first row, end row, scratch, lap) for chunks that start where pages do; lap(phase) says what the time went to.
template <class T, class W>
template <class Body>
void Engine<T, W>::in_chunks(const Segment& segment, Body&& body) {
    const int first = step_->query_start[segment.first], last = step_->query_start[segment.end], threads = pool_.num_threads();
    const long row_bytes = stream_ld() * sizeof(float) + (hidden_ld() + mlp_ld(layers_[segment.layer])) * long(sizeof(X));
    const int most = std::clamp<int>(kChunkBytes / row_bytes, kFewestRows, kMostRows);
    const int chunks = round_up(chunks_for(last - first, most), threads), rows = round_up(chunks_for(last - first, chunks), 32);
    cuts_.clear();
    for (int c = 0; c <= chunks; c++) cuts_.push_back(page_start(std::min(last, first + c * rows), first));
    pool_.run(chunks, [&](int c, int thread) {
        if (cuts_[c] >= cuts_[c + 1]) return;
        RowScratch& scratch = row_scratch_[thread];
        auto mark = Clock::now();
        body(cuts_[c], cuts_[c + 1], scratch, [&](Phase phase) {
            const auto now = Clock::now();
            scratch.seconds[phase] += std::chrono::duration<double>(now - mark).count();
            mark = now;
        });
    });
    // The time of the loop, by what its threads did.
    double sum = 0.0;
    for (const RowScratch& scratch : row_scratch_)
        for (double seconds : scratch.seconds) sum += seconds;
    const auto now = Clock::now();
    const double share = std::chrono::duration<double>(now - mark_).count() / std::max(sum, 1e-9);
    mark_ = now;
    for (RowScratch& scratch : row_scratch_)
        for (int i = 0; i < kPhases; i++) times_[i] += share * scratch.seconds[i], scratch.seconds[i] = 0.0;
}

}  // namespace boomerang
