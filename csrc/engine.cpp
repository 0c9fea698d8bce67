#include "engine.h"

#include <algorithm>
#include <atomic>

#include "dispatch.h"
#include "exact_sum.h"
#include "float_mode.h"
#include "parallel.h"

namespace lucid {
namespace {

std::atomic<int64_t> elements_of_batch = 1 << 16;

// If an operand is not contiguous, so many elements are copied to a buffer at a time. All buffers together stay in the
// first-level cache.
constexpr int64_t staged = 512;

// The weights of so many elements are averaged at a time, after their update, which leaves them in a cache.
constexpr int64_t averaged = 512;

template <class T>
Scalars<T> rounded(const HostScalars& host) {
  const bool from_average1 = host.beta1 >= 0.5;
  const bool from_average2 = host.beta2 >= 0.5;
  const bool ema_from_average = host.ema >= 0.5;
  return {static_cast<T>(from_average1 ? host.one_minus_beta1 : host.beta1),
          static_cast<T>(from_average2 ? host.one_minus_beta2 : host.beta2),
          static_cast<T>(host.d),
          static_cast<T>(host.k),
          static_cast<T>(host.s),
          static_cast<T>(host.e),
          static_cast<T>(host.f),
          static_cast<T>(ema_from_average ? host.one_minus_ema : host.ema),
          from_average1,
          from_average2,
          host.f != 1,
          host.cautious != 0,
          ema_from_average};
}

template <class Element>
void gather(const Layout& layout, int operand, const void* from, int64_t begin, int64_t n, void* to) {
  const auto* source = static_cast<const Element*>(from);
  auto* target = static_cast<Element*>(to);
  for_each_run(layout, operand, begin, n, [&](int64_t position, int64_t offset, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; ++i) target[position + i] = source[offset + i * stride];
  });
}

template <class Element>
void scatter(const Layout& layout, int operand, const void* from, int64_t begin, int64_t n, void* to) {
  const auto* source = static_cast<const Element*>(from);
  auto* target = static_cast<Element*>(to);
  for_each_run(layout, operand, begin, n, [&](int64_t position, int64_t offset, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; ++i) target[offset + i * stride] = source[position + i];
  });
}

using CopyFn = void (*)(const Layout&, int operand, const void* from, int64_t begin, int64_t n, void* to);

CopyFn gather_of(int64_t size) {
  return size == 8 ? gather<uint64_t> : size == 4 ? gather<uint32_t> : gather<uint16_t>;
}
CopyFn scatter_of(int64_t size) {
  return size == 8 ? scatter<uint64_t> : size == 4 ? scatter<uint32_t> : scatter<uint16_t>;
}

char* element(const Work& work, int operand, int64_t index) {
  return static_cast<char*>(work.address[operand]) + index * work.size[operand];
}

// Whether one kernel updates and averages the weights of a row.
bool averages_in_update(const Work& work) {
  return work.address[ema] != nullptr && work.compute == Type::float32 && work.param_format == ParamFormat::plain &&
         work.moment_format == MomentFormat::plain && !work.amsgrad;
}

void run_kernel(const Work& work, const Scalars<float>& scalars, const Slice& slice, bool own_gradient) {
  if (averages_in_update(work)) return kernels().f32_averaged(scalars, slice);
  const auto& by_format = kernels().f32[static_cast<int>(work.param_format)][static_cast<int>(work.moment_format)];
  by_format[own_gradient][work.amsgrad](scalars, slice);
  if (slice.at[ema] != nullptr) kernels().average_f32[static_cast<int>(work.param_format)](scalars, slice);
}

void run_kernel(const Work& work, const Scalars<double>& scalars, const Slice& slice, bool) {
  kernels().f64[work.amsgrad](scalars, slice);
  if (slice.at[ema] != nullptr) kernels().average_f64(scalars, slice);
}

void convert(Type type, const void* from, float* to, int64_t n) {
  kernels().to_f32[static_cast<int>(type)](from, to, n);
}
void convert(Type type, const void* from, double* to, int64_t n) {
  kernels().to_f64[static_cast<int>(type)](from, to, n);
}

// Elements [begin, begin + n) of an operand: in place if they are contiguous, else copied to `buffer`.
void* contiguous(const Work& work, int operand, int64_t begin, int64_t n, char* buffer) {
  if (work.layout->contiguous[operand]) return element(work, operand, begin);
  gather_of(work.size[operand])(*work.layout, operand, work.address[operand], begin, n, buffer);
  return buffer;
}

// Elements [begin, begin + n) of a gradient that the kernels cannot read in place: contiguous and in the compute type.
template <class T>
const void* staged_gradient(const Work& work, int64_t begin, int64_t n, char* buffer, T* converted) {
  const void* from = contiguous(work, grad, begin, n, buffer);
  if (work.gradient == work.compute) return from;
  convert(work.gradient, from, converted, n);
  return converted;
}

// Updates a slice of at most `staged` elements; operands that are not contiguous are copied to buffers and back.
template <class T>
void update_staged(const Work& work, const Scalars<T>& scalars, Slice slice) {
  const Layout& layout = *work.layout;
  alignas(64) char buffer[shaped_operands][staged * 8];
  alignas(64) T gradient[staged];
  for (int o = 0; o < shaped_operands; ++o) {
    if (work.address[o] == nullptr || o == grad) continue;
    slice.at[o] = contiguous(work, o, slice.first, slice.n, buffer[o]);
  }
  slice.at[grad] = const_cast<void*>(staged_gradient(work, slice.first, slice.n, buffer[grad], gradient));
  run_kernel(work, scalars, slice, false);
  for (int o = 0; o < shaped_operands; ++o) {
    if (work.address[o] == nullptr || o == grad || layout.contiguous[o]) continue;
    scatter_of(work.size[o])(layout, o, buffer[o], slice.first, slice.n, work.address[o]);
  }
}

// Updates a slice of contiguous operands.
template <class T>
void update_in_place(const Work& work, const Scalars<T>& scalars, Slice& slice) {
  for (int o = 0; o < shaped_operands; ++o) {
    if (work.address[o] != nullptr) slice.at[o] = element(work, o, slice.first);
  }
  run_kernel(work, scalars, slice, work.own_gradient);
}

// The first index from `index` on at which the row may be cut: any, or for 8-bit moments the beginning of a block.
int64_t cut(const Work& work, int64_t index) {
  if (work.moment_format != MomentFormat::eight_bit) return index;
  const int64_t in_row = index % work.row;
  return index - in_row + std::min(work.row, (in_row + block - 1) / block * block);
}

// Updates elements [begin, end) of a row, all in one run of numbers, in slices that are cut only between blocks.
template <class T>
void update_slices(const Work& work, const Scalars<T>& scalars, int64_t begin, int64_t end, Observed<T>* observed) {
  Slice slice{{},
              begin,
              end - begin,
              work.row,
              work.key,
              work.numbering == nullptr ? begin : work.numbering->of(begin),
              work.param_format == ParamFormat::bfloat16_drawn,
              observed};
  slice.at[exp_avg_scale] = work.address[exp_avg_scale];
  slice.at[exp_avg_sq_scale] = work.address[exp_avg_sq_scale];
  if (work.layout == nullptr && work.address[ema] == nullptr) return update_in_place(work, scalars, slice);
  const int64_t most = work.layout != nullptr ? staged : averages_in_update(work) ? slice.n : averaged;
  for (; slice.first < end; slice.first += slice.n, slice.number += slice.n) {
    const int64_t full = slice.first + most;  // 8-bit: the first cut after full - block is at most at full
    if (full >= end) {
      slice.n = end - slice.first;
    } else {
      slice.n = (work.moment_format == MomentFormat::eight_bit ? cut(work, full - block + 1) : full) - slice.first;
    }
    if (work.layout != nullptr) {
      update_staged(work, scalars, slice);
    } else {
      update_in_place(work, scalars, slice);
    }
  }
}

// Updates elements [begin, end) of a row; for 8-bit moments, the blocks that begin there.
template <class T>
void update_part(const Work& work, const Scalars<T>& scalars, int64_t begin, int64_t end, RowObserved* observed) {
  begin = cut(work, begin);
  end = cut(work, end);
  for (int64_t next; begin < end; begin = next) {
    next = work.numbering == nullptr ? end : std::min(end, work.numbering->end_of_run(begin));
    if (observed == nullptr) {
      update_slices<T>(work, scalars, begin, next, nullptr);
      continue;
    }
    next = std::min(next, cut(work, begin + observed_at_once));
    Observed<T> seen;
    update_slices(work, scalars, begin, next, &seen);
    observed->add(seen);
  }
}

// Small rows end before the hardware prefetcher has found a pattern, so their first cache lines are prefetched here.
void prefetch(const Work& work) {
  constexpr int64_t line = 64, lines = 4;
  for (int o = 0; o < shaped_operands; ++o) {
    if (work.address[o] == nullptr) continue;
    const char* address = static_cast<const char*>(work.address[o]);
    const int64_t bytes = work.elements * work.size[o];
    for (int64_t at = 0; at < bytes && at < line * lines; at += line) __builtin_prefetch(address + at);
  }
}

// All rows are laid end to end; batch b is elements [b * size, (b + 1) * size) of them.
struct Step {
  const std::vector<const Work*>& works;
  std::vector<int64_t> ends;  // of each row, in elements
  std::vector<Scalars<float>> f32;
  std::vector<Scalars<double>> f64;
  int64_t size;
  std::vector<RowObserved>
      observed;  // empty, or: the part of row r in batch b is at r + b, which is different for each part

  void run(int64_t batch) {
    const int64_t begin = batch * size;
    const int64_t end = std::min(begin + size, ends.back());
    size_t row = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin());
    for (int64_t i = begin; i < end; ++row) {
      const Work& work = *works[row];
      if (row + 2 < works.size()) prefetch(*works[row + 2]);
      const int64_t first = i - (ends[row] - work.elements);
      const int64_t n = std::min(end, ends[row]) - i;
      const auto which = static_cast<size_t>(work.scalars);
      if (n > 0) {
        RowObserved* const seen = observed.empty() ? nullptr : &observed[row + static_cast<size_t>(batch)];
        if (work.compute == Type::float64) {
          update_part(work, f64[which], first, first + n, seen);
        } else {
          update_part(work, f32[which], first, first + n, seen);
        }
      }
      i += n;
    }
  }

  void sum_up(std::vector<RowObserved>& rows) const {
    for (size_t row = 0; row < works.size(); ++row) {
      const int64_t begin = ends[row] - works[row]->elements;
      for (int64_t batch = begin / size; batch * size < ends[row]; ++batch) {
        rows[row].add(observed[row + static_cast<size_t>(batch)]);
      }
    }
  }
};

// Adds the squares of elements [begin, begin + n) of a row's gradient.
void add_squares(const Work& work, int64_t begin, int64_t n, ExactSum& sum) {
  if (work.layout == nullptr) {
    sum.add(work.gradient, work.compute, element(work, grad, begin), n);
    return;
  }
  alignas(64) char buffer[staged * 8];
  alignas(64) double converted[staged];
  const int64_t end = begin + n;
  for (int64_t i = begin; i < end; i += staged) {
    const int64_t count = std::min(staged, end - i);
    const void* from = work.compute == Type::float64
                           ? staged_gradient(work, i, count, buffer, converted)
                           : staged_gradient(work, i, count, buffer, reinterpret_cast<float*>(converted));
    sum.add(work.compute, work.compute, from, count);
  }
}

// All rows are laid end to end, as in Step. The sum is exact, so batches may add theirs in any order.
struct Squares {
  const std::vector<const Work*>& works;
  const std::vector<int>& kinds;
  std::vector<int64_t> ends;  // of each row, in elements
  std::vector<std::atomic<int64_t>> words;
  double scale;
  int64_t size;
  std::atomic<int> window = ExactSum::no_window;  // the last batch's, for the next

  void run(int64_t batch) {
    const int64_t begin = batch * size;
    const int64_t end = std::min(begin + size, ends.back());
    size_t row = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin());
    ExactSum sum(scale, window.load(std::memory_order_relaxed));
    for (int64_t i = begin; i < end; ++row) {
      const Work& work = *works[row];
      const int64_t first = i - (ends[row] - work.elements);
      const int64_t n = std::min(end, ends[row]) - i;
      if (n > 0) add_squares(work, first, n, sum);
      i += n;
      if (i == end) window.store(sum.window(), std::memory_order_relaxed);
      if (i == end || (!kinds.empty() && kinds[row] != kinds[row + 1])) {
        sum.move_to(&words[static_cast<size_t>(kinds.empty() ? 0 : kinds[row] * total_words)]);
      }
    }
  }
};

}  // namespace

uint64_t draw_key(int64_t stream, int64_t step) {
  return mixed(mixed(static_cast<uint64_t>(stream)) + static_cast<uint64_t>(step));
}

int64_t batch_elements() { return elements_of_batch; }
void set_batch_elements(int64_t elements) { elements_of_batch = elements; }

std::vector<int64_t> squares(const std::vector<const Work*>& works, const std::vector<int>& kinds, int number_of_kinds,
                             double scale, int threads) {
  const FloatMode mode;
  const auto size = static_cast<size_t>(number_of_kinds * total_words);
  Squares all{works, kinds,
              {},    std::vector<std::atomic<int64_t>>(size),
              scale, std::min(batch_elements(), ExactSum::most_elements)};
  all.ends.reserve(works.size());
  int64_t total = 0;
  for (const Work* work : works) all.ends.push_back(total += work->elements);
  const BatchFn run = [](void* context, int64_t batch) noexcept { static_cast<Squares*>(context)->run(batch); };
  parallel_for(threads, (total + all.size - 1) / all.size, run, &all, true);
  std::vector<int64_t> words(all.words.begin(), all.words.end());
  for (size_t k = 0; k < size; k += total_words) carry(&words[k]);
  return words;
}

void update(const std::vector<const Work*>& works, const std::vector<HostScalars>& scalars, int threads, bool serial,
            std::vector<RowObserved>* observed) {
  if (works.empty()) return;
  const FloatMode mode;
  Step step{works, {}, {}, {}, batch_elements(), {}};
  step.ends.reserve(works.size());
  int64_t total = 0;
  for (const Work* work : works) step.ends.push_back(total += work->elements);
  for (const HostScalars& host : scalars) {
    step.f32.push_back(rounded<float>(host));
    step.f64.push_back(rounded<double>(host));
  }
  const int64_t batches = (total + step.size - 1) / step.size;
  if (observed != nullptr) {
    step.observed.resize(works.size() + static_cast<size_t>(batches));
    observed->assign(works.size(), {});
  }
  const BatchFn run = [](void* context, int64_t batch) noexcept { static_cast<Step*>(context)->run(batch); };
  parallel_for(serial ? 1 : threads, batches, run, &step);
  if (observed != nullptr) step.sum_up(*observed);
}

void move(int64_t n, float* a, const float* b, float* c, float* d, int threads) {
  struct Arrays {
    int64_t n, size;
    float* a;
    const float* b;
    float *c, *d;
  } arrays{n, batch_elements(), a, b, c, d};
  const BatchFn run = [](void* context, int64_t batch) noexcept {
    const Arrays& all = *static_cast<const Arrays*>(context);
    const int64_t i = batch * all.size;
    kernels().move(std::min(all.size, all.n - i), all.a + i, all.b + i, all.c + i, all.d + i);
  };
  parallel_for(threads, (n + arrays.size - 1) / arrays.size, run, &arrays);
}

}  // namespace lucid
