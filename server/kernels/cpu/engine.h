// Runs one step of the program on the CPU: embedding, layers, final norm.
//
// The hidden state stays float32 throughout; products take activations of Act<W> with float32 sums.
// T: type of norms, biases and KV. W: type of the packed weights; for Codes activations are kept as float and rounded to
// eight bits before each product.
#pragma once
#include <chrono>
#include <vector>

#include "attention_int8.h"
#include "attention_many.h"
#include "buffer.h"
#include "pack.h"
#include "pool.h"
#include "products.h"
#include "rows.h"
#include "step.h"

namespace boomerang {

template <class T, class W>
class Engine {
  public:
    Engine(const BsSpec& spec, const BsLayer* layers, const BsDifference* differences, int num_layers, const BsEnd* ends, int num_threads)
        : s_(spec), layers_(layers, layers + num_layers), differences_(differences, differences + num_layers), ends_{ends[0], ends[1]}, pages_(spec.page_size, spec.head_dim, spec.num_kv_heads), int8_pages_(spec.page_size, spec.head_dim, spec.num_kv_heads),
          pool_(num_threads), attention_(num_threads), row_scratch_(num_threads) {
        // Where tiles are int8 counts among them.
        auto is_plain = [](const BsWeights& w) { return w.data && (w.type == BS_FLOAT || w.type == BS_BF16 || w.type == BS_BF12 || (kHasTiles<bf16> && w.type == BS_INT8)); };
        for (const BsLayer& layer : layers_)
            for (const BsWeights* w : {&layer.qkv, &layer.o, &layer.up, &layer.down})
                for (; w; w = w->more) has_plain_ |= is_plain(*w);
        for (const BsEnd& end : ends_) has_plain_ |= is_plain(end.head);
        if (s_.factor_type != BS_INT8)
            for (const BsDifference& d : differences_) has_plain_ |= d.qkv.num_terms > 0;
        auto is_dual = [&](const BsWeights& w) { return w.nested && !w.more && w.type != BS_INT8 && is_plain(w); };
        splits_ = is_dual(ends_[0].head) && is_dual(ends_[1].head);
        for (const BsLayer& layer : layers_)
            for (const BsWeights* w : {&layer.qkv, &layer.o, &layer.up, &layer.down}) splits_ &= !w->data || is_dual(*w);
        for (const BsDifference& d : differences_) splits_ &= !d.qkv.num_terms;
        has_plain_ &= kCoded && sizeof(T) == 2;
    }

    void step(const BsStep& step) {
        step_ = &step;
        const size_t tokens = step.num_tokens;
        hidden_.at_least(tokens * stream_ld());
        q_.at_least(tokens * s_.num_heads * pages_.padded_dim);
        attended_.at_least(tokens * attended_ld());
        pool_.begin(step.doorbell);
        mark_ = Clock::now();
        embed();
        for (const int32_t* restore = step.restores; restore != step.restores + 2 * step.num_restores; restore += 2) {
            const float* from = step.states + long(restore[1]) * s_.hidden;
            std::copy(from, from + s_.hidden, hidden_.data() + long(restore[0]) * stream_ld());
        }
        run_program();
        for (int i = 0; i < step.num_rows; i++) {
            const BsEnd& end = ends_[i < step.norm_cut ? 0 : 1];
            norm(hidden_.data() + long(step.rows[i]) * stream_ld(), step.out + long(i) * s_.hidden, end.norm_w, end.norm_b, s_.hidden);
        }
        count(kNorm);
        pool_.end();
    }

    void head(const float* rows, const uint8_t* widths, int M, int end, float* logits) {
        const float* b = widen(ends_[end].head_b, s_.vocab, false);
        head_product(rows, widths, M, end, [&](int m, int count, int panel, const float* sums) {
            const int n = panel * kPanel;
            put_block<false>(logits + long(m) * s_.vocab + n, s_.vocab, sums, count, s_.vocab - n, scale_of(ends_[end].head, n), b ? b + n : nullptr);
        });
    }

    void greedy(const float* rows, const uint8_t* widths, int M, int end, int32_t* tokens) {
        const float* b = widen(ends_[end].head_b, s_.vocab, false);
        const int panels = panels_of(s_.vocab), chunk = head_chunk(panels);
        best_.assign(size_t(chunks_for(panels, chunk)) * M, {-INFINITY, 0});
        head_product(rows, widths, M, end, [&](int m, int count, int panel, float* sums) {
            const int n = panel * kPanel;
            put_block<false>(sums, kPanel, sums, count, std::min(kPanel, s_.vocab - n), scale_of(ends_[end].head, n), b ? b + n : nullptr);
            Best* best = best_.data() + size_t(panel / chunk) * M + m;
            for (int i = 0; i < count; i++) better(best[i], sums + i * kPanel, n, std::min(kPanel, s_.vocab - n));
        });
        for (int m = 0; m < M; m++) {
            Best best = best_[m];
            for (size_t i = m; i < best_.size(); i += M)
                if (best_[i].value > best.value) best = best_[i];
            tokens[m] = std::isfinite(best.value) ? best.token : -1;
        }
    }

    Pool& pool() { return pool_; }
    const BsSpec& spec() const { return s_; }

    void times(double* seconds) {
        std::copy(times_, times_ + kPhases, seconds);
        std::fill(times_, times_ + kPhases, 0.0);
    }

  private:
    using X = Act<W>;
    using A = Act<T>;  // of attention and of factors
    static constexpr bool kCoded = std::is_same<W, Codes>::value;
    static constexpr int kRowsPerThread = 128;  // from which products are split by rows: reading weights once per thread pays
    static constexpr bool kFast = kCoded || sizeof(X) == 2;
    static_assert(kCoded || std::is_same<X, A>::value, "K, V and weights are multiplied with the same activations");
    using Clock = std::chrono::steady_clock;
    enum Phase { kProduct, kAttention, kPlace, kNorm, kHead, kEmbed, kPhases };
    struct Best {
        float value;
        int32_t token;
    };
    struct Segment {
        int layer, first, end, split, student;
    };
    // Activations as codes are multiplied with them.
    struct Rounded {
        Buffer<int8_t> codes;
        Buffer<BlockOfRow> blocks;
        Buffer<float> floats;
        Buffer<Act<bf16>> plain;
    };
    // What a thread needs for a chunk of rows (engine_rows.h).
    struct RowScratch {
        Buffer<X> normed, act;
        Buffer<float> qkv, post;
        Rounded rounded, rounded_act;
        double seconds[kPhases] = {};
    };
    struct Item {
        int request, head, from, to, first_page, end_page, part;
    };
    struct Merge {
        int token, head, part, num_parts;
    };

    bool has_int8_kv() const { return s_.kv_type == BS_INT8; }
    int q_width() const { return s_.num_heads * s_.head_dim; }
    int kv_width() const { return s_.num_kv_heads * s_.head_dim; }
    int qkv_width() const { return q_width() + 2 * kv_width(); }
    int all_heads() const { return s_.num_heads + 2 * s_.num_kv_heads; }
    int stream_ld() const { return row_stride<float, float>(s_.hidden); }  // of the hidden state
    int qkv_ld() const { return row_stride<float, float>(qkv_width()); }
    int hidden_ld() const { return row_stride<W, X>(s_.hidden); }
    int attended_ld() const { return row_stride<W, A>(q_width()); }
    int act_ld() const { return row_stride<W, X>(round_up(s_.intermediate, kPanel)); }
    int up_width() const { return s_.gated ? 2 * s_.intermediate : s_.intermediate; }
    int group() const { return s_.num_heads / s_.num_kv_heads; }

    void count(Phase phase) {
        const auto now = Clock::now();
        times_[phase] += std::chrono::duration<double>(now - mark_).count();
        mark_ = now;
    }

    static Weights weights(const BsWeights& w, int N, int K) { return {static_cast<const char*>(w.data), N, K, w.scale, w.exponents, w.rest_start, w.rest, w.type, w.rows, w.more, static_cast<const char*>(w.nested)}; }
    static BsWeights from_panel(BsWeights w, int panel, int K) {
        if constexpr (kCoded) {
            const char* nested = w.nested ? static_cast<const char*>(w.nested) + panel * coded_panel_bytes(BS_NESTED_8, K) : nullptr;
            for (; w.more && panel >= panels_of(w.rows); w = *w.more) panel -= panels_of(w.rows);
            const long bytes = w.type == BS_FLOAT ? units_of<float>(K) * kLine<float> : w.type == BS_BF16 ? units_of<bf16>(K) * kLine<bf16> : w.type == BS_BF12 ? units_of<bf12>(K) * kLine<bf12> : coded_panel_bytes(w.type, K);
            return {static_cast<const char*>(w.data) + panel * bytes, w.scale ? w.scale + panel * kPanel : nullptr, w.exponents ? w.exponents + panel * kLineWeights : nullptr,
                    w.rest_start ? w.rest_start + panel : nullptr, w.rest, w.type, w.rows - panel * kPanel, w.more, nested};
        }
        return {static_cast<const char*>(w.data) + long(panel) * units_of<W>(K) * kLine<W>, w.scale ? w.scale + panel * kPanel : nullptr,
                w.exponents ? w.exponents + panel * kLineWeights : nullptr, w.rest_start ? w.rest_start + panel : nullptr, w.rest};
    }
    static const float* scale_of(const BsWeights& w, int n) { return w.scale ? w.scale + n : nullptr; }

    // A bias as float, in buffer `place`; `gated`: in the order of the panels.
    const float* widen(const void* values, int n, bool gated, int place = 0) {
        if (!values) return nullptr;
        const int channels = (gated ? num_panels(n, true) : panels_of(n)) * kPanel;
        float* to = bias_[place].at_least(channels);
        for (int i = 0; i < channels; i++) {
            const int row = source_row(i, n, gated);
            to[i] = row < 0 ? 0.0f : to_float(static_cast<const T*>(values)[row]);
        }
        return to;
    }

    // Rows x [M, K] as products with W take them, of these widths; `alone`: by this thread.
    template <class In>
    Rows<W> prepared(const In* x, long ldx, int M, int K, Rounded& to, const uint8_t* widths, bool alone = false) {
        if constexpr (kCoded) {
            Rows<W> rows = rounded(x, ldx, M, K, to, alone, widths);
            rows.widths = widths;
            return rows;
        } else {
            return {x, ldx, M, in_registers(M)};
        }
    }
    // Whether so many rows are few enough to do without tiles where each is to get the sums that it has alone.
    bool in_registers(int M) const { return s_.rows_alone && M <= 32; }
    const uint8_t* widths_from(int token) const { return step_->widths ? step_->widths + token : nullptr; }

    template <class In>
    Rows<Codes> rounded(const In* x, long ldx, int M, int K, Rounded& to, bool alone = false, const uint8_t* widths = nullptr) {
        constexpr bool is_float = std::is_same<In, float>::value;
        const long ldc = (chunks_for(K, 64) | 1) * 64, ldb = groups_of(K), ldf = row_stride<Codes, float>(K), ldp = row_stride<bf16, Act<bf16>>(K);
        int8_t* codes = to.codes.at_least(M * ldc);
        BlockOfRow* blocks = to.blocks.at_least(M * ldb);
        float* floats = is_float ? nullptr : to.floats.at_least(M * ldf);
        Act<bf16>* plain = has_plain_ ? to.plain.at_least(M * ldp) : nullptr;
        auto rows = [&](int from, int end) {
            for (int m = from; m < end; m++) {
                const float* row;
                if constexpr (is_float)
                    row = x + m * ldx;
                else
                    convert_row(x + m * ldx, floats + m * ldf, K), row = floats + m * ldf;
                // Where every matrix has both forms, a row meets one of them only.
                const bool is_exact = !widths || widths[m] == BS_EXACT;
                if (!splits_ || !is_exact) round_row(row, K, codes + m * ldc, blocks + m * ldb);
                if (plain && (!splits_ || is_exact)) convert_row(row, plain + m * ldp, K), std::fill(plain + m * ldp + K, plain + m * ldp + padded<bf16>(K), Act<bf16>{});
            }
        };
        if (alone || M <= 8)
            rows(0, M);
        else
            pool_.run(chunks_for(M, 8), [&](int c, int) { rows(8 * c, std::min(M, 8 * c + 8)); });
        const float* wide = floats;
        if constexpr (is_float) wide = x;
        return {wide, is_float ? ldx : ldf, M, {codes, ldc, blocks, ldb}, plain, ldp, bool(s_.exact_activations), in_registers(M)};
    }

    template <class Out>
    void norm(const float* x, Out* y, const void* weight, const void* bias, int n) const {
        if (!weight) return convert_row(x, y, n);
        norm_row(x, y, static_cast<const T*>(weight), static_cast<const T*>(bias), n, s_.stream_eps, s_.layer_norm, s_.norm_offset);
    }

    // Where a product goes that is normed by `weight` before it is added to the hidden state: zeros [M, stream_ld()] of `to`.
    float* before_norm(const void* weight, float* hidden, int M, Buffer<float>& to) const {
        if (!weight) return hidden;
        float* rows = to.at_least(size_t(M) * stream_ld());
        std::fill(rows, rows + size_t(M) * stream_ld(), 0.0f);
        return rows;
    }
    void add_normed(const float* rows, float* hidden, const void* weight, int from, int to) const {
        for (int m = from; weight && m < to; m++) norm_row<true>(rows + m * long(stream_ld()), hidden + m * long(stream_ld()), static_cast<const T*>(weight), static_cast<const T*>(nullptr), s_.hidden, s_.eps, s_.layer_norm, s_.norm_offset);
    }

    void norm_tokens(int first, int last, const void* weight, const void* bias) {
        auto rows = [&](int from, int to) {
            for (int t = from; t < to; t++) norm(hidden_.data() + long(t) * stream_ld(), normed_.data() + long(t) * hidden_ld(), weight, bias, s_.hidden);
        };
        if (last - first <= 8)
            rows(first, last);
        else
            pool_.run(chunks_for(last - first, 8), [&](int c, int) { rows(first + 8 * c, std::min(last, first + 8 * c + 8)); });
        count(kNorm);
    }

    // What a product is followed by, for threads to fetch: their ranges of its panels.
    struct Next {
        const BsWeights* w = nullptr;
        int panels = 0, K = 0, chunk = 1;
    };
    int panels_at_once(int panels) const { return std::max(1, std::min(8, panels / (8 * pool_.num_threads()))); }
    Next next_product(const BsWeights& w, int panels, int K) const { return {&w, panels, K, panels_at_once(panels)}; }

    // Where chunk `c` of `num` ends a thread's range, `part` is followed by that thread's range of the next product.
    void set_then(Part& part, int c, int num, const Next& next) const {
        for (int i = 0; next.w && i < pool_.num_threads(); i++) {
            if (c + 1 != pool_.first(i + 1, num) || c + 1 == pool_.first(i, num)) continue;
            const BsWeights then = from_panel(*next.w, pool_.first(i, chunks_for(next.panels, next.chunk)) * next.chunk, next.K);
            part.then = static_cast<const char*>(then.data), part.then_nested = static_cast<const char*>(then.nested);
        }
    }

    // part(Part) for all parts of a product. `next`: of codes.
    template <class Each>
    void in_parts(int M, int panels, const Next& next, Each&& each) {
        // Many rows: each thread takes rows, and finds them in its own cache in one product after the other. Few: panels.
        const int threads = pool_.num_threads();
        if (M >= kRowsPerThread * threads) {
            const int rows = std::min(512, round_up(chunks_for(M, threads), 32));
            pool_.run(chunks_for(M, rows), [&](int c, int) { each(Part{c * rows, std::min(M, (c + 1) * rows), 0, panels}); });
        } else {
            const int chunk = panels_at_once(panels), num = chunks_for(panels, chunk);
            pool_.run(num, [&](int c, int) {
                Part part = {0, M, c * chunk, std::min(panels, (c + 1) * chunk)};
                if constexpr (kCoded) set_then(part, c, num, next);
                each(part);
            });
        }
        count(kProduct);
    }

    template <class V, class Sink>
    void product(const Rows<V>& x, const Weights& w, int panels, Sink&& sink) {
        in_parts(x.M, panels, {}, [&](const Part& part) { multiply<V>(x, w, part, sink); });
    }

    // A part of y (+)= x w + bias.
    template <bool add>
    static void product_part(const Rows<W>& x, const BsWeights& w, int N, int K, const float* bias, float* y, long ldy, const Part& part) {
        if constexpr (!kCoded)
            if (!bias && !w.scale && N % kPanel == 0) return multiply_into<add>(x, weights(w, N, K), part, y, ldy);
        multiply<W>(x, weights(w, N, K), part, [&](int m, int rows, int panel, const float* sums) {
            const int n = panel * kPanel;
            put_block<add>(y + m * ldy + n, ldy, sums, rows, N - n, scale_of(w, n), bias ? bias + n : nullptr);
        });
    }

    template <bool add>
    void product_to(const Rows<W>& x, const BsWeights& w, int N, int K, const void* bias, float* y, long ldy, const Next& next) {
        const float* b = widen(bias, N, false);
        in_parts(x.M, panels_of(N), next, [&](const Part& part) { product_part<add>(x, w, N, K, b, y, ldy, part); });
    }

    // y [rows of x, ldy] (+)= b (a x).
    template <bool add>
    void product_of_factors(const Rows<W>& x, const BsFactors& f, int K, float* y, long ldy) {
        if (!f.num_terms || !x.M) return;
        if (s_.factor_type == BS_INT8) {
            if constexpr (kCoded)
                product_of<Codes, add>(x, f, K, y, ldy);
            else
                product_of<Codes, add>(rounded(x.x, x.ldx, x.M, K, rounded_), f, K, y, ldy);
        } else if constexpr (sizeof(T) == 4) {
            product_of<float, add>({x.x, x.ldx, x.M}, f, K, y, ldy);
        } else if constexpr (kCoded) {
            product_of<bf16, add>({x.plain, x.ld_plain, x.M, x.in_registers}, f, K, y, ldy);
        } else {
            product_of<bf16, add>({x.x, x.ldx, x.M, x.in_registers}, f, K, y, ldy);
        }
    }

    template <class V, bool add>
    void product_of(const Rows<V>& x, const BsFactors& f, int K, float* y, long ldy) {
        using L = typename std::conditional<std::is_same<V, Codes>::value, float, A>::type;
        int rank = 0, panels = 0;
        for (int i = 0; i < f.num_terms; i++) {
            rank += f.terms[i].rank;
            panels += panels_of(f.terms[i].stop - f.terms[i].start);
        }
        L* low;
        if constexpr (std::is_same<V, Codes>::value)
            low = wide_low_.at_least(size_t(x.M) * rank);
        else
            low = low_.at_least(size_t(x.M) * rank);
        product(x, weights(f.a, rank, K), panels_of(rank), [&](int m, int rows, int panel, const float* sums) {
            for (int half = 0; half < kPanel; half += 16) {
                const F16 factor = f.a.scale ? load16(f.a.scale + panel * kPanel + half) : set16(1.0f);
                for (int r = 0; r < rows; r++) store16(low + long(m + r) * rank + panel * kPanel + half, load16(sums + r * kPanel + half) * factor);
            }
        });
        Rows<V> between;
        if constexpr (std::is_same<V, Codes>::value)
            between = rounded(low, rank, x.M, rank, rounded_low_);
        else
            between = {low, rank, x.M, x.in_registers};
        // All terms in one go: their panels one after the other.
        const int chunk = std::max(1, std::min(8, panels / (8 * pool_.num_threads())));
        pool_.run(chunks_for(panels, chunk), [&](int c, int) {
            int begin = 0, at = 0;
            for (int i = 0; i < f.num_terms; i++) {
                const BsTerm& term = f.terms[i];
                const int N = term.stop - term.start, from = std::max(c * chunk - begin, 0), to = std::min((c + 1) * chunk - begin, panels_of(N));
                if (from < to)
                    multiply<V>(from_input(between, at), weights(term.b, N, term.rank), {0, x.M, from, to}, [&](int m, int rows, int panel, const float* sums) {
                        const int n = panel * kPanel;
                        put_block<add>(y + m * ldy + term.start + n, ldy, sums, rows, N - n, scale_of(term.b, n), nullptr);
                    });
                begin += panels_of(N);
                at += term.rank;
            }
        });
        count(kProduct);
    }

    // The first product of a segment, or after the last one of the step the head's.
    Next first_product(const Segment* segment) const {
        if (segment) return next_product(layers_[segment->layer].qkv, panels_of(qkv_width()), s_.hidden);
        const int panels = panels_of(s_.vocab);
        return {&ends_[step_->norm_cut > 0 ? 0 : 1].head, panels, s_.hidden, head_chunk(panels)};
    }

    // Requests [r0, split) run layer `id`; [split, r1) run the difference `d` to it, as layer `student`. `after`: what follows.
    void layer(const Segment& segment, const Next& after) {
        const auto [id, r0, r1, split, student] = segment;
        const BsLayer& w = layers_[id];
        const BsDifference& d = differences_[student];
        const int t0 = step_->query_start[r0], ts = step_->query_start[split], t1 = step_->query_start[r1], M = t1 - t0, E = s_.hidden;
        const int first = ts - t0, others = t1 - ts;  // the difference's rows
        auto norms = [&](const void* weight, const void* bias, const void* own) {
            norm_tokens(t0, ts, weight, bias);
            norm_tokens(ts, t1, own ? own : weight, bias);
        };
        const uint8_t* widths = widths_from(t0);
        const size_t tokens = step_->num_tokens;
        normed_.at_least(tokens * hidden_ld());
        qkv_.at_least(tokens * qkv_ld());
        act_.at_least(tokens * act_ld());
        float* hidden = hidden_.data() + long(t0) * stream_ld();
        const X* normed = normed_.data() + long(t0) * hidden_ld();
        X* act = act_.data() + long(t0) * act_ld();
        norms(w.attn_norm_w, w.attn_norm_b, d.attn_norm_w);
        Rows<W> x = prepared(normed, hidden_ld(), M, E, rounded_, widths);
        product_to<false>(x, w.qkv, qkv_width(), E, w.qkv_b, qkv_.data() + long(t0) * qkv_ld(), qkv_ld(), others ? Next{} : next_product(w.o, panels_of(E), q_width()));
        product_of_factors<true>(from_row(x, first), d.qkv, E, qkv_.data() + long(ts) * qkv_ld(), qkv_ld());
        if (first) place(id, w, r0, split), attention(id, w, r0, split);
        if (others) place(student, w, split, r1), attention(student, w, split, r1);
        if (s_.parallel_residual) norms(w.mlp_norm_w, w.mlp_norm_b, d.mlp_norm_w);
        // A product that is added to the hidden state, what a difference adds to it included.
        auto add_product = [&](const BsWeights& weights, const BsFactors& factors, int K, const void* bias, const void* norm_w, const Next& next) {
            float* to = before_norm(norm_w, hidden, M, post_);
            product_to<true>(x, weights, E, K, bias, to, stream_ld(), others ? Next{} : next);
            product_of_factors<true>(from_row(x, first), factors, K, to + long(first) * stream_ld(), stream_ld());
            if (norm_w) pool_.run(chunks_for(M, 8), [&](int c, int) { add_normed(to, hidden, norm_w, 8 * c, std::min(M, 8 * c + 8)); }), count(kNorm);
        };
        x = prepared(attended_.data() + long(t0) * attended_ld(), attended_ld(), M, q_width(), rounded_, widths);
        const int up_panels = num_panels(up_width(), s_.gated);
        add_product(w.o, d.o, q_width(), w.o_b, w.post_attn_norm_w, next_product(w.up, up_panels, E));
        if (!s_.parallel_residual) norms(w.mlp_norm_w, w.mlp_norm_b, d.mlp_norm_w);
        // What the difference adds to gate and up has to be there before the activation.
        const int N = up_width();
        float* extra = d.up.num_terms && others ? extra_.at_least(size_t(others) * N) : nullptr;
        x = prepared(normed, hidden_ld(), M, E, rounded_, widths);
        product_of_factors<false>(from_row(x, first), d.up, E, extra, N);
        mlp_up(w, x, act, extra, first, others ? Next{} : next_product(w.down, panels_of(E), s_.intermediate));
        x = prepared(act, act_ld(), M, s_.intermediate, rounded_, widths);
        add_product(w.down, d.down, s_.intermediate, w.down_b, w.post_mlp_norm_w, after);
    }

    // `extra`: [rows from `first` on, up_width()] to add before the activation, or null.
    void mlp_up(const BsLayer& w, const Rows<W>& x, X* act, const float* extra, int first_extra, const Next& next) {
        const int N = up_width();
        const float* b = widen(w.up_b, N, s_.gated);
        in_parts(x.M, num_panels(N, s_.gated), next, [&](const Part& part) { mlp_up_part(w, x, b, act, act_ld(), extra, first_extra, part); });
    }

    // `act` [rows, ld] begins with what panel `panel0` gives.
    void mlp_up_part(const BsLayer& w, const Rows<W>& x, const float* b, X* act, long ld, const float* extra, int first_extra, const Part& part, int panel0 = 0) const {
        const bool gated = s_.gated;
        const int N = up_width(), width = gated ? 16 : kPanel;
        multiply<W>(x, weights(w.up, N, s_.hidden), part, [&](int m, int rows, int panel, const float* sums) {
            F16 factor[2], offset[2];
            for (int half = 0; half < 2; half++) {
                const int n = panel * kPanel + 16 * half;
                factor[half] = w.up.scale ? load16(w.up.scale + n) : set16(1.0f);
                offset[half] = b ? load16(b + n) : zero16();
            }
            X* to = act + m * ld + (panel - panel0) * width;
            for (int r = 0; r < rows; r++, to += ld) {
                F16 first = fma16(load16(sums + r * kPanel), factor[0], offset[0]), second = fma16(load16(sums + r * kPanel + 16), factor[1], offset[1]);
                if (extra && m + r >= first_extra) {
                    const float* row = extra + long(m + r - first_extra) * N;
                    const int width = gated ? N / 2 : N, n = gated ? panel * 16 : panel * kPanel, n2 = gated ? N / 2 + n : n + 16;
                    first = first + load16(row + n, tail16(width - n));
                    second = second + load16(row + n2, tail16(N - n2));
                }
                if (gated) {
                    store16(to, activate16<kFast>(first, s_.activation) * second);
                } else {
                    store16(to, activate16<kFast>(first, s_.activation));
                    store16(to + 16, activate16<kFast>(second, s_.activation));
                }
            }
        });
    }

    // Row `n` of a packed embedding.
    void unpack(const BsWeights& packed, int n, float* to) const {
        const Weights w = weights(packed, s_.vocab, s_.hidden);
        if constexpr (!kCoded)
            return unpack_row(w, n, to, W{});
        else if (with_form(w.type, [&](auto form) { unpack_codes_row<decltype(form)>(w.data, w.scale, n, w.K, to); }))
            return;
        else if (w.type == BS_FLOAT)
            return unpack_row(w, n, to, float{});
        else if (w.type == BS_BF16)
            return unpack_row(w, n, to, bf16{});
        unpack_row(w, n, to, bf12{});
    }

    void embed() {
        const int chunk = 16;
        pool_.run(chunks_for(step_->num_tokens, chunk), [&](int c, int) {
            for (int t = c * chunk; t < std::min(step_->num_tokens, (c + 1) * chunk); t++) {
                const BsEnd& end = ends_[t < step_->embed_cut ? 0 : 1];
                float* to = hidden_.data() + long(t) * stream_ld();
                if (end.embed)
                    convert_row(static_cast<const T*>(end.embed) + long(step_->input_ids[t]) * s_.hidden, to, s_.hidden);
                else
                    unpack(end.packed_embed, step_->input_ids[t], to);
                if (s_.input_scale != 1.0f)
                    for (int i = 0; i < s_.hidden; i++) to[i] *= s_.input_scale;
                if (!end.positions) continue;
                const T* position = static_cast<const T*>(end.positions) + long(step_->positions[t]) * s_.hidden;
                for (int i = 0; i < s_.hidden; i++) to[i] += to_float(position[i]);
            }
        });
        count(kEmbed);
    }

    // Defined in engine_rows.h.
    void run_program();
    bool by_rows(const Segment& segment) const;
    template <class Body>
    void in_chunks(const Segment& segment, Body&& body);
    int mlp_piece(const BsLayer& w) const;
    int mlp_ld(const BsLayer& w) const { return row_stride<W, X>(round_up(mlp_piece(w) * kPerUnit<W>, kPanel)); }
    int heads_at_once(int h) const;
    void widen_biases(const BsLayer& w, const float** biases);

    // Defined in engine_attention.h.
    void find_requests(int r0, int r1);
    int page_start(int t, int first) const;
    void place(int id, const BsLayer& w, int r0, int r1);
    void place_heads(int id, const BsLayer& w, int from, int to, int first, int h0, int h1, float* rows, long ld);
    void attention(int id, const BsLayer& w, int r0, int r1);
    int pages_in_part(int pages) const;

    // Queries of a KV head's group for token t: [kv head][token][group][padded_dim].
    A* q_row(int kv_head, int t) { return q_.data() + (long(kv_head) * step_->num_tokens + t) * group() * pages_.padded_dim; }

    static int head_chunk(int panels) { return std::max(1, std::min(8, panels / 16)); }

    template <class Sink>
    void head_product(const float* rows, const uint8_t* widths, int M, int end, Sink&& sink) {
        mark_ = Clock::now();
        normed_.at_least(size_t(M) * hidden_ld());
        for (int m = 0; m < M; m++) convert_row(rows + long(m) * s_.hidden, normed_.data() + long(m) * hidden_ld(), s_.hidden);
        const int panels = panels_of(s_.vocab), chunk = head_chunk(panels);
        pool_.begin();
        const Rows<W> x = prepared(normed_.data(), hidden_ld(), M, s_.hidden, rounded_, widths);
        pool_.run(chunks_for(panels, chunk), [&](int c, int) {
            multiply<W>(x, weights(ends_[end].head, s_.vocab, s_.hidden), {0, M, c * chunk, std::min(panels, (c + 1) * chunk)}, sink);
        });
        pool_.end();
        count(kHead);
    }

    static void better(Best& best, const float* values, int first, int n) {
        for (int i = 0; i < n; i++)
            if (values[i] > best.value) best = {values[i], first + i};
    }

    BsSpec s_;
    std::vector<BsLayer> layers_;
    std::vector<BsDifference> differences_;
    BsEnd ends_[2];
    PageShape<T> pages_;
    Int8Pages int8_pages_;  // instead, where KV is of eight bits
    Pool pool_;
    std::vector<AttentionScratch<T>> attention_;
    std::vector<RowScratch> row_scratch_;
    const BsStep* step_ = nullptr;
    Buffer<float> hidden_, qkv_, bias_[4], parts_, extra_, post_;
    Buffer<X> normed_, act_;
    Buffer<A> q_, attended_, low_;
    Buffer<float> wide_low_;
    Rounded rounded_, rounded_low_;
    bool has_plain_ = false;  // some matrix among codes is none
    bool splits_ = false;     // all are none, and have nested codes beside them
    std::vector<Item> items_;
    std::vector<Merge> merges_;
    std::vector<int> tokens_, cuts_;
    std::vector<Best> best_;
    double times_[kPhases] = {};
    Clock::time_point mark_;
};

}  // namespace boomerang

#include "engine_attention.h"
#include "engine_rows.h"
