#include "plan.h"

#include "pool.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <utility>

namespace lucid {
namespace {

constexpr const char* slot_names[] = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
constexpr DLDataType step_type = {2, 32, 1};

// With thousands of small tensors a step is made of cache misses. What rows[i] will read first is asked for
// while rows before it are read.
constexpr size_t rows_ahead = 6;

// Steps without a look at the state before it is worth finding out whether anyone else can still reach it,
// and steps before that is tried again where someone can.
constexpr int quiet_steps = 8;
constexpr int quiet_steps_after_failure = 1024;

// Elements below which a step keeps the interpreter's lock: a fraction of a millisecond.
constexpr int64_t worth_unlocking = 1 << 19;

}  // namespace

Plan::Plan(nb::list groups) {
  int group = 0;
  for (nb::handle params : groups) {
    for (nb::handle param : nb::cast<nb::list>(params)) rows_.emplace_back(param.ptr(), group);
    ++group;
  }
  layouts_.resize(rows_.size());
}

Plan::~Plan() { release(); }

bool Plan::same_groups(nb::list groups) const {
  size_t row = 0;
  int group = 0;
  for (nb::handle params : groups) {
    if (!PyList_CheckExact(params.ptr())) return false;
    const Py_ssize_t n = PyList_GET_SIZE(params.ptr());
    for (Py_ssize_t i = 0; i < n; ++i, ++row) {
      if (row == rows_.size() || rows_[row].group != group) return false;
      if (rows_[row].param != PyList_GET_ITEM(params.ptr(), i)) return false;
      if (rows_[row].param_type != Py_TYPE(rows_[row].param)) return false;
    }
    ++group;
  }
  return row == rows_.size();
}

bool Plan::same_tensor(const Row& row, int operand, const DLTensor& tensor) const {
  if (!on_cpu(tensor) || tensor.ndim != row.ndim || tensor.byte_offset != 0) return false;
  if (!(tensor.dtype == (operand == grad ? row.gradient_type : row.type))) return false;
  const int64_t* shape = dims_.data() + row.dims;
  const int64_t* strides = shape + (operand + 1) * row.ndim;
  for (int k = 0; k < row.ndim; ++k) {
    if (tensor.shape[k] != shape[k] || tensor.strides[k] != strides[k]) return false;
  }
  return operand == grad ? aligned(tensor) && (tensor.data != nullptr || row.work.elements == 0)
                         : tensor.data == row.work.address[operand];
}

bool Plan::overlaps(const Row& row, const void* gradient) const {
  const auto* begin = static_cast<const char*>(gradient);
  const char* end = begin + row.span[grad];
  for (int o = 0; o <= row.moments() + 1; ++o) {
    const auto* other = static_cast<const char*>(row.work.address[o]);
    if (o != grad && begin < other + row.span[o] && other < end) return true;
  }
  return false;
}

// The row's gradient of this step; `look` where it is not such as it was bound with.
void Plan::gather_gradient(Row& row) {
  PyObject* gradient = gradient_of(row.param);
  if (gradient == nullptr) throw nb::python_error();
  row.active = gradient != Py_None;
  if (!row.active) {
    Py_DECREF(gradient);
    return;
  }
  row.gradient = gradient;
  Py_INCREF(row.param);
  DLTensor tensor;
  row.look = !row.bound || !is_plain_tensor(gradient) || !read(gradient, &tensor) || !same_tensor(row, grad, tensor) ||
             overlaps(row, tensor.data);
  // A lazily negated real gradient is the imaginary part of a conjugate, so that no stride of it is 1 but where it
  // has one element: a dense one need not be asked, which would cost as much as all else here.
  row.may_be_lazy |= is_complex(row.type) || row.work.layout != nullptr || row.work.elements == 1 ||
                     (row.look && is_lazy_view(gradient));
  if (!row.look && row.may_be_lazy) row.look = is_lazy_view(gradient);
  if (row.look) return;
  row.work.address[grad] = tensor.data;
  row.near_gradient = reinterpret_cast<uintptr_t>(tensor.shape);
  row.look = !read(row.param, &tensor) || !same_tensor(row, param, tensor) ||
             (is_complex(row.type) && is_lazy_view(row.param));
  row.near_param = reinterpret_cast<uintptr_t>(tensor.shape);
}

void Plan::hold_slots(Row& row) {
  if (row.holds_slots) return;
  for (int k = 0; k <= row.moments(); ++k) Py_INCREF(row.slot[k]);
  row.holds_slots = true;
}

// Walks through the state as it was walked through last and reads its addresses; false where it holds other
// objects than then.
bool Plan::gather_state(PyObject* state) {
  Py_ssize_t at = 0;
  PyObject *key, *entry;
  size_t visited = 0, slot = 0;
  while (PyDict_Next(state, &at, &key, &entry)) {
    if (visited == seen_entries_.size()) return false;
    const SeenEntry& seen = seen_entries_[visited++];
    if (visited + rows_ahead < seen_entries_.size()) __builtin_prefetch(seen_entries_[visited + rows_ahead].entry);
    const size_t ahead = slot + 3 * rows_ahead;
    for (size_t k = ahead; k < ahead + 3 && k < seen_slots_.size(); ++k) {
      __builtin_prefetch(seen_slots_[k].value);
      __builtin_prefetch(reinterpret_cast<const void*>(seen_slots_[k].near));
    }
    if (key != seen.key || entry != seen.entry) return false;
    if (seen.row < 0) continue;
    if (!PyDict_Check(entry) || PyDict_GET_SIZE(entry) != seen.slots) return false;
    Row& row = rows_[static_cast<size_t>(seen.row)];
    bool same = true;
    Py_ssize_t inner = 0;
    PyObject *name, *value;
    while (PyDict_Next(entry, &inner, &name, &value)) {
      SeenSlot& known = seen_slots_[slot++];
      if (name != known.key || value != known.value) return false;
      if (!row.bound || known.slot < 0 || known.slot > row.moments()) continue;
      DLTensor tensor;
      if (!read(value, &tensor)) {
        same = false;
        continue;
      }
      known.near = reinterpret_cast<uintptr_t>(tensor.shape);
      if (known.slot == 0) {
        same &= tensor.data == row.step && tensor.ndim == 0 && on_cpu(tensor) && tensor.dtype == step_type;
      } else {
        same &= same_tensor(row, known.slot + 1, tensor) && !(is_complex(row.type) && is_lazy_view(value));
      }
    }
    if (!same) {
      row.bound = false;
      row.look = row.active;
    } else if (row.active && !row.look) {
      hold_slots(row);
    }
  }
  return visited == seen_entries_.size();
}

// Whether nobody but the optimizer holds the state, an entry, a tensor in it or its storage: then none of
// them can change before someone asks the optimizer for its state.
bool Plan::unreachable(PyObject* state) const {
  if (Py_REFCNT(state) != 1 || has_weak_references(state)) return false;
  const nb::object lone = nb::module_::import_("torch").attr("zeros")(1, nb::arg("device") = "cpu");
  const long fresh = storage_references(lone.ptr());
  if (fresh < 0) return false;
  const SeenSlot* slot = seen_slots_.data();
  for (const SeenEntry& seen : seen_entries_) {
    if (seen.row < 0) continue;
    const Py_ssize_t own = rows_[static_cast<size_t>(seen.row)].holds_slots ? 2 : 1;
    if (Py_REFCNT(seen.entry) != 1) return false;
    for (const SeenSlot* end = slot + seen.slots; slot != end; ++slot) {
      if (slot->slot < 0) continue;
      if (Py_REFCNT(slot->value) != own || has_weak_references(slot->value)) return false;
      if (storage_references(slot->value) != fresh) return false;
    }
  }
  return true;
}

nb::object Plan::gather(nb::list groups, nb::list state_box) try {
  release();
  gathered_ = true;
  PyObject* state = PyList_GET_ITEM(state_box.ptr(), 0);
  if (PyList_GET_ITEM(state_box.ptr(), 1) != Py_False) {
    sealed_ = false;
    quiet_ = 0;
    state_box[1] = false;
  }
  if (!PyDict_Check(state)) throw nb::type_error("the optimizer's state: expected a dict");
  if (!same_groups(groups)) return nb::none();
  if (last_elements_ > batch_elements() && last_elements_ < worth_unlocking * 8) expect_work(last_threads_);
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (i + rows_ahead < rows_.size()) {
      const Row& ahead = rows_[i + rows_ahead];
      __builtin_prefetch(ahead.param);
      for (const uintptr_t near : {ahead.near_param, ahead.near_gradient}) {
        for (const uintptr_t at : {near - 64, near, near + 64}) __builtin_prefetch(reinterpret_cast<const void*>(at));
      }
    }
    gather_gradient(rows_[i]);
  }
  unread_ = sealed_ && !changed_;
  if (changed_ || (!sealed_ && !gather_state(state))) {
    changed_ = true;
    for (Row& row : rows_) {
      row.bound &= row.active;  // the others' state may be another when they take part again
      row.look = row.active;
    }
  } else if (!sealed_ && ++quiet_ >= quiet_steps) {
    sealed_ = unreachable(state);
    if (!sealed_) quiet_ = quiet_steps - quiet_steps_after_failure;
  }
  nb::list looks;
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (!rows_[i].look) continue;
    looks.append(i);
    rows_[i].active = false;  // until it is bound
  }
  return looks;
} catch (...) {
  release();
  throw;
}

nb::object Plan::bind(size_t index, nb::handle gradient, nb::dict entry, nb::tuple slots) {
  Row& row = rows_.at(index);
  drop_slots(row);
  const bool was_bound = std::exchange(row.bound, false);
  const int ndim_before = row.ndim;
  const int operands = static_cast<int>(slots.size()) + 1;
  PyObject* object[max_operands] = {row.param, gradient.ptr()};
  for (int k = 1; k < static_cast<int>(slots.size()); ++k) object[k + 1] = slots[static_cast<size_t>(k)].ptr();

  DLTensor tensor[max_operands], step;
  for (int o = 0; o < operands; ++o) {
    if (!read(object[o], &tensor[o]) || !on_cpu(tensor[o]) || tensor[o].byte_offset != 0) {
      return nb::str("its memory cannot be read as a plain CPU tensor's");
    }
    if (tensor[o].data == nullptr && elements(tensor[o]) > 0)
      return nb::str("it, its gradient or its state has no memory");
    if (!aligned(tensor[o])) return nb::str("an address is not a multiple of its element's size");
  }
  if (!read(slots[0].ptr(), &step)) return nb::str("its step count cannot be read");

  row.ndim = tensor[param].ndim;
  row.type = tensor[param].dtype;
  row.gradient_type = tensor[grad].dtype;
  row.work.amsgrad = operands == max_operands;
  row.work.elements = elements(tensor[param]);
  if (!real_type(row.type, &row.work.compute) || !real_type(row.gradient_type, &row.work.gradient)) {
    return nb::str("the CPU engine does not know its dtype");
  }

  // A complex number is two reals, one after the other.
  const bool complex = is_complex(row.type);
  const int ndim = row.ndim + complex;
  if (!was_bound || row.ndim != ndim_before) {
    changed_ = true;
    row.dims = dims_.size();
    dims_.resize(row.dims + static_cast<size_t>((operands + 1) * row.ndim));
  }
  int64_t* dim = dims_.data() + row.dims;
  std::vector<int64_t> reals(static_cast<size_t>((operands + 1) * ndim));
  const int64_t* strides[max_operands];
  for (int o = -1; o < operands; ++o) {
    const int64_t* from = o < 0 ? tensor[param].shape : tensor[o].strides;
    int64_t* to = reals.data() + (o + 1) * ndim;
    for (int k = 0; k < row.ndim; ++k) {
      *dim++ = from[k];
      to[k] = complex && o >= 0 ? 2 * from[k] : from[k];
    }
    if (complex) to[row.ndim] = o < 0 ? 2 : 1;
    if (o < 0) continue;
    strides[o] = to;
    changed_ |= o != grad && row.work.address[o] != tensor[o].data;
    row.work.address[o] = tensor[o].data;
    row.span[o] = span_in_bytes(tensor[o]);
  }
  if (complex) row.work.elements *= 2;
  Layout& layout = layouts_[index];
  layout = Layout::of(ndim, reals.data(), operands, strides);
  const bool direct = row.work.compute == row.work.gradient &&
                      std::all_of(layout.contiguous, layout.contiguous + operands, [](bool c) { return c; });
  row.work.layout = direct ? nullptr : &layout;
  row.step = static_cast<float*>(step.data);
  changed_ |= row.entry != entry.ptr();
  row.entry = entry.ptr();
  for (size_t k = 0; k < slots.size(); ++k) {
    changed_ |= row.slot[k] != slots[k].ptr();
    row.slot[k] = slots[k].ptr();
  }
  Py_INCREF(gradient.ptr());
  Py_XSETREF(row.gradient, gradient.ptr());
  hold_slots(row);
  sealed_ &= !changed_;
  row.bound = true;
  row.active = true;
  row.look = false;
  return nb::none();
}

void Plan::remember(nb::dict state) {
  if (!changed_) return;
  std::unordered_map<PyObject*, int> row_of;
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (rows_[i].bound) row_of.emplace(rows_[i].param, static_cast<int>(i));
  }
  seen_entries_.clear();
  seen_slots_.clear();
  Py_ssize_t at = 0;
  PyObject *key, *entry;
  while (PyDict_Next(state.ptr(), &at, &key, &entry)) {
    const auto found = row_of.find(key);
    if (found == row_of.end() || !PyDict_Check(entry)) {
      seen_entries_.push_back({key, entry, 0, -1});
      continue;
    }
    seen_entries_.push_back({key, entry, PyDict_GET_SIZE(entry), found->second});
    Py_ssize_t inner = 0;
    PyObject *name, *value;
    while (PyDict_Next(entry, &inner, &name, &value)) {
      int slot = -1;
      for (int k = 0; k < 4; ++k) {
        if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, slot_names[k]) == 0) slot = k;
      }
      seen_slots_.push_back({name, value, slot, 0});
    }
  }

  // Rows that were bound again with other dimensions have left gaps.
  std::vector<int64_t> dims;
  std::vector<std::pair<const char*, const char*>> spans;
  for (Row& row : rows_) {
    if (!row.bound) continue;
    const auto begin = dims_.begin() + static_cast<std::ptrdiff_t>(row.dims);
    row.dims = dims.size();
    dims.insert(dims.end(), begin, begin + (row.moments() + 3) * row.ndim);
    for (int o = 0; o <= row.moments() + 1; ++o) {
      if (o == grad || row.span[o] == 0) continue;
      const auto* first = static_cast<const char*>(row.work.address[o]);
      spans.emplace_back(first, first + row.span[o]);
    }
  }
  dims_.swap(dims);
  std::sort(spans.begin(), spans.end());
  serial_ = false;
  for (size_t i = 1; i < spans.size(); ++i) {
    serial_ |= spans[i].first < spans[i - 1].second;
    spans[i].second = std::max(spans[i].second, spans[i - 1].second);
  }
  changed_ = false;
}

std::vector<std::pair<int, double>> Plan::steps() {
  std::vector<std::pair<int, double>> found;
  size_t first_of_group = 0;
  int group = -1;
  for (Row& row : rows_) {
    if (!row.active) continue;
    if (row.group != group) {
      group = row.group;
      first_of_group = found.size();
    }
    const double step = static_cast<double>(*row.step) + 1;
    size_t which = first_of_group;
    while (which < found.size() && found[which].second != step) ++which;
    if (which == found.size()) found.emplace_back(group, step);
    row.work.scalars = static_cast<int>(which);
  }
  return found;
}

nb::list Plan::params() const {
  nb::list active;
  for (const Row& row : rows_) {
    if (row.active) active.append(nb::handle(row.param));
  }
  return active;
}

// Another thread may have been given the sealed state since gather().
bool Plan::still_same(PyObject* state) {
  sealed_ = false;
  return gather_state(state) && std::none_of(rows_.begin(), rows_.end(), [](const Row& row) { return row.look; });
}

void Plan::run(const std::vector<HostScalars>& scalars, int threads, nb::list state_box) {
  if (unread_ && PyList_GET_ITEM(state_box.ptr(), 1) != Py_False && !still_same(PyList_GET_ITEM(state_box.ptr(), 0))) {
    throw std::runtime_error(
        "another thread changed the optimizer's state during step(), so nothing was updated; "
        "let one thread change it while no other steps");
  }
  works_.clear();
  int64_t total = 0;
  for (Row& row : rows_) {
    if (!row.active) continue;
    works_.push_back(row.work);
    total += row.work.elements;
  }
  last_elements_ = total;
  last_threads_ = serial_ ? 1 : threads;
  if (total < worth_unlocking) {
    update(works_, scalars, threads, serial_);
  } else {
    for (Row& row : rows_) {
      if (row.active) hold_slots(row);
    }
    const nb::gil_scoped_release unlocked;
    update(works_, scalars, threads, serial_);
  }
  // update() throws before its first write or not at all.
  for (const Row& row : rows_) {
    if (row.active) *row.step += 1;
  }
  ran_ = true;
}

void Plan::drop_slots(Row& row) {
  if (!row.holds_slots) return;
  for (int k = 0; k <= row.moments(); ++k) Py_DECREF(row.slot[k]);
  row.holds_slots = false;
}

void Plan::release() {
  if (!gathered_) return;
  gathered_ = false;
  for (Row& row : rows_) {
    drop_slots(row);
    if (row.gradient != nullptr) Py_DECREF(row.param);
    Py_CLEAR(row.gradient);
    row.active = row.look = false;
  }
  ran_ = false;
}

}  // namespace lucid
