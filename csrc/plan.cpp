#include "plan.h"

#include "pool.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <unordered_map>
#include <utility>

namespace lucid {
namespace {

struct Slot {
  const char* key;
  int16_t role;
};

// The keys of a parameter's state, but for "step" and "stream".
constexpr Slot slots_of_rows[] = {
    {"exp_avg", exp_avg},
    {"exp_avg_sq", exp_avg_sq},
    {"max_exp_avg_sq", max_exp_avg_sq},
    {"exp_avg_code", exp_avg},
    {"exp_avg_sq_code", exp_avg_sq},
    {"exp_avg_scale", exp_avg_scale},
    {"exp_avg_sq_scale", exp_avg_sq_scale},
    {"residual", lower},
    {"master", lower},
};

bool is_key(PyObject* key, const char* name) {
  return PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, name) == 0;
}

// With thousands of small tensors a step is made of cache misses. What rows[i] will read first is asked for
// while rows before it are read.
constexpr size_t rows_ahead = 6;

// Steps without a look at the state before it is worth finding out whether anyone else can still reach it,
// and steps before that is tried again where someone can.
constexpr int quiet_steps = 8;
constexpr int quiet_steps_after_failure = 1024;

// Elements below which a step keeps the interpreter's lock: a fraction of a millisecond.
constexpr int64_t worth_unlocking = 1 << 19;

// Bytes that a thread of a device best reads at once.
constexpr uintptr_t wide_load = 16;

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
    const Py_ssize_t n = PyList_Size(params.ptr());
    for (Py_ssize_t i = 0; i < n; ++i, ++row) {
      if (row == rows_.size() || rows_[row].group != group) return false;
      if (rows_[row].param != PyList_GetItem(params.ptr(), i)) return false;
      if (rows_[row].param_type != Py_TYPE(rows_[row].param)) return false;
    }
    ++group;
  }
  return row == rows_.size();
}

bool Plan::same_tensor(const Tensor& known, const DLTensor& tensor) const {
  if (!(tensor.device == known.device) || tensor.ndim != known.ndim || tensor.byte_offset != 0 ||
      !(tensor.dtype == known.type)) {
    return false;
  }
  const int64_t* shape = dims_.data() + known.shape;
  const int64_t* strides = dims_.data() + known.strides;
  for (int k = 0; k < known.ndim; ++k) {
    if (tensor.shape[k] != shape[k] || tensor.strides[k] != strides[k]) return false;
  }
  return known.role == grad || tensor.data == known.address;
}

bool Plan::overlaps(const Row& row, const void* gradient) const {
  const auto* begin = static_cast<const char*>(gradient);
  const char* end = begin + tensors_[row.first + 1].span;
  for (int k = 0; k < row.tensors; ++k) {
    const Tensor& tensor = tensors_[row.first + static_cast<size_t>(k)];
    const auto* other = static_cast<const char*>(tensor.address);
    if (tensor.role != grad && begin < other + tensor.span && other < end) return true;
  }
  return false;
}

Plan::Tensor Plan::known(const DLTensor& tensor, PyObject* object, int16_t role) {
  const auto shape = static_cast<uint32_t>(dims_.size());
  dims_.insert(dims_.end(), tensor.shape, tensor.shape + tensor.ndim);
  dims_.insert(dims_.end(), tensor.strides, tensor.strides + tensor.ndim);
  return {object,        tensor.data,
          tensor.device, span_in_bytes(tensor),
          shape,         shape + static_cast<uint32_t>(tensor.ndim),
          tensor.dtype,  static_cast<int16_t>(tensor.ndim),
          role};
}

// Whether the parameter is spread as when it was bound, and its gradient like it.
bool Plan::same_spread(Row& row) {
  if (row.shard == nullptr) return !is_sharded(row.param) && !is_sharded(row.gradient);
  if (!is_sharded(row.gradient)) return false;
  Shard& shard = *row.shard;
  const nb::object gradient = nb::steal(spec_of(row.gradient));
  if (!nb::steal(spec_of(row.param)).is(shard.spec) || !gradient.is_valid()) return false;
  if (gradient.is(shard.spec) || gradient.is(shard.gradient_spec)) return true;
  if (!spread_alike(shard.spec.ptr(), gradient.ptr())) return false;
  shard.gradient_spec = gradient;
  return true;
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
  const bool same_spread = this->same_spread(row);
  PyObject* const param = local_of(row.param);
  gradient = local_of(gradient);
  row.look = !row.bound || !same_spread || !is_plain_tensor(gradient) || !read(gradient, &tensor) ||
             !same_tensor(tensors_[row.first + 1], tensor) || !aligned(tensor) ||
             (tensor.data == nullptr && row.work.elements > 0) || overlaps(row, tensor.data);
  // A lazily negated real gradient is the imaginary part of a conjugate, so that no stride of it is 1 but where it
  // has one element: a dense one need not be asked, which would cost as much as all else here.
  row.may_be_lazy |=
      row.is_complex || row.work.layout != nullptr || row.work.elements == 1 || (row.look && is_lazy_view(gradient));
  if (!row.look && row.may_be_lazy) row.look = is_lazy_view(gradient);
  if (row.look) return;
  row.work.address[grad] = tensor.data;
  if (row.wide && reinterpret_cast<uintptr_t>(tensor.data) % wide_load != 0) {
    row.wide = false;
    ++device_structure_;
  }
  row.near_gradient = reinterpret_cast<uintptr_t>(tensor.shape);
  row.look =
      !read(param, &tensor) || !same_tensor(tensors_[row.first], tensor) || (row.is_complex && is_lazy_view(param));
  row.near_param = reinterpret_cast<uintptr_t>(tensor.shape);
}

void Plan::hold_slots(Row& row) {
  if (row.holds_slots) return;
  for (int k = 2; k < row.tensors; ++k) Py_INCREF(tensors_[row.first + static_cast<size_t>(k)].object);
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
    if (!PyDict_Check(entry) || PyDict_Size(entry) != seen.slots) return false;
    Row& row = rows_[static_cast<size_t>(seen.row)];
    bool same = true;
    Py_ssize_t inner = 0;
    PyObject *name, *value;
    while (PyDict_Next(entry, &inner, &name, &value)) {
      SeenSlot& seen_slot = seen_slots_[slot++];
      if (name != seen_slot.key || value != seen_slot.value) return false;
      if (!row.bound || seen_slot.tensor < 0) continue;
      DLTensor tensor;
      value = local_of(value);
      if (!read(value, &tensor)) {
        same = false;
        continue;
      }
      seen_slot.near = reinterpret_cast<uintptr_t>(tensor.shape);
      same &= same_tensor(tensors_[row.first + static_cast<size_t>(seen_slot.tensor)], tensor) &&
              !(row.is_complex && is_lazy_view(value));
    }
    if (!same) {
      unbind(row);
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
    const Row& row = rows_[static_cast<size_t>(seen.row)];
    if (Py_REFCNT(seen.entry) != 1) return false;
    for (const SeenSlot* end = slot + seen.slots; slot != end; ++slot) {
      if (slot->tensor < 0) continue;
      const bool guessed = row.guessed && tensors_[row.first + static_cast<size_t>(slot->tensor)].role == step_role;
      const Py_ssize_t own = 1 + row.holds_slots + guessed;
      if (Py_REFCNT(slot->value) != own || has_weak_references(slot->value)) return false;
      PyObject* const local = local_of(slot->value);
      if (local != slot->value && (Py_REFCNT(local) != 1 || has_weak_references(local))) return false;
      if (storage_references(local) != fresh) return false;
    }
  }
  return true;
}

nb::object Plan::gather(nb::list groups, nb::list state_box) try {
  release();
  gathered_ = true;
  PyObject* state = PyList_GetItem(state_box.ptr(), 0);
  if (PyList_GetItem(state_box.ptr(), 1) != Py_False) {
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
      if (!row.active) unbind(row);  // its state may be another when it takes part again
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

void Plan::unbind(Row& row) {
  device_structure_ += row.bound && row.on_device;
  row.bound = false;
}

nb::object Plan::bind(size_t index, nb::handle gradient, nb::dict entry, nb::dict slots, Numbering numbering,
                      bool on_device) {
  Row& row = rows_.at(index);
  drop_slots(row);
  unbind(row);
  row.on_device = on_device;
  row.wide = on_device;

  struct Found {
    PyObject* object;
    int16_t role;
  };
  std::vector<Found> found = {{row.param, param}, {gradient.ptr(), grad}, {nullptr, step_role}};
  Work work = {};
  for (auto [key, value] : slots) {
    if (is_key(key.ptr(), "step")) found[2].object = value.ptr();
    if (is_key(key.ptr(), "stream")) found.push_back({value.ptr(), stream_role});
    for (const Slot& slot : slots_of_rows) {
      if (is_key(key.ptr(), slot.key)) found.push_back({value.ptr(), slot.role});
    }
    if (is_key(key.ptr(), "exp_avg_code")) work.moment_format = MomentFormat::eight_bit;
    work.amsgrad |= is_key(key.ptr(), "max_exp_avg_sq");
  }
  if (found[2].object == nullptr) return nb::str("it has no step count");

  std::vector<DLTensor> read_tensors(found.size());
  for (size_t k = 0; k < found.size(); ++k) {
    DLTensor& tensor = read_tensors[k];
    const bool on_host = found[k].role < 0 || !on_device;
    if (!read(local_of(found[k].object), &tensor) || !(on_host ? on_cpu(tensor) : has_addresses(tensor)) ||
        tensor.byte_offset != 0) {
      return nb::str(on_host ? "its memory cannot be read as a plain CPU tensor's"
                             : "its memory cannot be read as a plain tensor's");
    }
    if (!on_host) row.wide &= reinterpret_cast<uintptr_t>(tensor.data) % wide_load == 0;
    if (tensor.data == nullptr && elements(tensor) > 0) return nb::str("it, its gradient or its state has no memory");
    if (!aligned(tensor)) return nb::str("an address is not a multiple of its element's size");
  }

  const DLTensor& parameter = read_tensors[0];
  row.is_complex = is_complex(parameter.dtype);
  Type type, moments = Type::float32;
  if (!real_type(parameter.dtype, &type) || !real_type(read_tensors[1].dtype, &work.gradient)) {
    return nb::str("no engine knows its dtype");
  }
  work.compute = type == Type::float64 ? type : Type::float32;
  work.own_gradient = work.gradient == type;
  const int ndim = parameter.ndim + row.is_complex;  // a complex number is two reals, one after the other
  work.elements = elements(parameter) * (row.is_complex ? 2 : 1);
  row.shard.reset();
  if (is_sharded(row.param)) row.shard.reset(new Shard{nb::steal(spec_of(row.param)), {}});
  row.numbering = numbering;
  work.numbering = numbering.first == 0 && numbering.run >= work.elements ? nullptr : &row.numbering;
  work.row = parameter.ndim == 0 || parameter.shape[0] == 0 ? work.elements : work.elements / parameter.shape[0];

  std::vector<int64_t> shape(static_cast<size_t>(ndim));
  std::vector<int64_t> strides(static_cast<size_t>(shaped_operands * ndim));
  const int64_t* strides_of[shaped_operands] = {};
  bool has_lower = false;
  for (size_t k = 0; k < found.size(); ++k) {
    const DLTensor& tensor = read_tensors[k];
    const int role = found[k].role;
    if (role < 0) continue;
    work.address[role] = tensor.data;
    if (role < shaped_operands) work.size[role] = static_cast<int8_t>(tensor.dtype.bits / (row.is_complex ? 16 : 8));
    has_lower |= role == lower;
    if (role == exp_avg && work.moment_format == MomentFormat::plain && !real_type(tensor.dtype, &moments)) {
      return nb::str("no engine knows the dtype of its state");
    }
    if (role >= shaped_operands) continue;
    int64_t* to = strides.data() + role * ndim;
    for (int dim = 0; dim < parameter.ndim; ++dim) {
      shape[static_cast<size_t>(dim)] = parameter.shape[dim];
      to[dim] = tensor.strides[dim] * (row.is_complex ? 2 : 1);
    }
    if (row.is_complex) {
      shape.back() = 2;
      to[parameter.ndim] = 1;
    }
    strides_of[role] = to;
  }
  if (moments == Type::bfloat16) work.moment_format = MomentFormat::bfloat16;
  if (type == Type::bfloat16) {
    work.param_format = has_lower ? ParamFormat::bfloat16_residual : ParamFormat::bfloat16;
  } else if (type == Type::float16) {
    work.param_format = has_lower ? ParamFormat::float16_master : ParamFormat::float16;
  }

  Layout& layout = layouts_[index];
  layout = Layout::of(ndim, shape.data(), strides_of, work.moment_format != MomentFormat::plain);
  if (work.moment_format == MomentFormat::eight_bit) {
    for (const int codes : {exp_avg, exp_avg_sq}) {
      if (!layout.contiguous[codes]) return nb::str("its codes do not lie in row-major order");
    }
    const int64_t blocks = work.elements / std::max<int64_t>(work.row, 1) * ((work.row + block - 1) / block);
    for (size_t k = 0; k < found.size(); ++k) {
      if (found[k].role < shaped_operands) continue;
      if (elements(read_tensors[k]) != blocks || span_in_bytes(read_tensors[k]) != 4 * blocks) {
        return nb::str("its scales are not one for each block");
      }
    }
  }
  const bool readable = on_device || work.gradient == work.compute || work.own_gradient;
  work.layout = readable && layout.all_contiguous() ? nullptr : &layout;
  row.work = work;

  changed_ |= row.entry != entry.ptr() || row.tensors != static_cast<int>(found.size());
  for (size_t k = 0; k < found.size() && !changed_; ++k) {
    const Tensor& before = tensors_[row.first + k];
    changed_ = before.role != found[k].role ||
               (k != 1 && (before.address != read_tensors[k].data || !same_tensor(before, read_tensors[k]))) ||
               (k > 1 && before.object != found[k].object);
  }
  row.entry = entry.ptr();
  row.first = tensors_.size();
  row.tensors = static_cast<int>(found.size());
  row.stream = nullptr;
  for (size_t k = 0; k < found.size(); ++k) {
    tensors_.push_back(known(read_tensors[k], found[k].object, found[k].role));
    if (found[k].role == stream_role) row.stream = static_cast<const int64_t*>(read_tensors[k].data);
  }
  row.step = static_cast<float*>(read_tensors[2].data);
  Py_INCREF(gradient.ptr());
  Py_XDECREF(std::exchange(row.gradient, gradient.ptr()));
  hold_slots(row);
  sealed_ &= !changed_;
  device_structure_ += on_device;
  row.bound = true;
  row.active = true;
  row.look = false;
  return nb::none();
}

void Plan::compare() {
  if (!changed_) return;
  struct Span {
    const char *begin, *end;
    bool of_state;
  };
  std::vector<Span> spans;
  for (const Row& row : rows_) {
    if (!row.bound) continue;
    for (int k = 0; k < row.tensors; ++k) {
      const Tensor& tensor = tensors_[row.first + static_cast<size_t>(k)];
      if (tensor.role == grad || tensor.role == stream_role || tensor.span == 0) continue;
      const auto* first = static_cast<const char*>(tensor.address);
      spans.push_back({first, first + tensor.span, tensor.role != param});
    }
  }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  serial_ = false;
  for (size_t i = 1; i < spans.size(); ++i) {
    const Span& before = spans[i - 1];
    if (spans[i].begin < before.end) {
      if (spans[i].of_state || before.of_state) {
        throw nb::value_error(
            "the state of two parameters, or of one and another parameter, lies in the same memory, so that one update "
            "would undo the other; clone() one of the state's tensors");
      }
      serial_ = true;
      spans[i].end = std::max(spans[i].end, before.end);
    }
  }
}

void Plan::remember(nb::dict state) {
  if (!changed_) {
    if (tensors_.size() > 2 * remembered_tensors_) compact();
    return;
  }
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
    seen_entries_.push_back({key, entry, PyDict_Size(entry), found->second});
    Py_ssize_t inner = 0;
    PyObject *name, *value;
    while (PyDict_Next(entry, &inner, &name, &value)) {
      const Row& row = rows_[static_cast<size_t>(found->second)];
      int tensor = -1;
      for (int k = 2; k < row.tensors; ++k) {
        if (tensors_[row.first + static_cast<size_t>(k)].object == value) tensor = k;
      }
      seen_slots_.push_back({name, value, tensor, 0});
    }
  }

  compact();
  changed_ = false;
}

// Rows that were bound again have left gaps.
void Plan::compact() {
  std::vector<Tensor> tensors;
  std::vector<int64_t> dims;
  for (Row& row : rows_) {
    if (!row.bound && !row.holds_slots) {
      row.entry = nullptr;
      row.tensors = 0;
      continue;
    }
    const size_t first = tensors.size();
    for (int k = 0; k < row.tensors; ++k) {
      Tensor tensor = tensors_[row.first + static_cast<size_t>(k)];
      const auto begin = dims_.begin() + static_cast<std::ptrdiff_t>(tensor.shape);
      tensor.shape = static_cast<uint32_t>(dims.size());
      tensor.strides = tensor.shape + static_cast<uint32_t>(tensor.ndim);
      dims.insert(dims.end(), begin, begin + 2 * tensor.ndim);
      tensors.push_back(tensor);
    }
    row.first = first;
  }
  tensors_.swap(tensors);
  dims_.swap(dims);
  remembered_tensors_ = tensors_.size();
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
    const double count = static_cast<double>(*row.step);
    const double step = std::floor(count) == count ? count + 1 : count;  // one that is not whole is seen to be none
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

int64_t Plan::collect() {
  works_.clear();
  active_.clear();
  int64_t total = 0;
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (!rows_[i].active || rows_[i].on_device) continue;
    works_.push_back(&rows_[i].work);
    active_.push_back(static_cast<int>(i));
    total += rows_[i].work.elements;
  }
  return total;
}

std::vector<DeviceRow> Plan::device_rows() const {
  std::vector<DeviceRow> found;
  for (size_t i = 0; i < rows_.size(); ++i) {
    const Row& row = rows_[i];
    if (!row.bound || !row.on_device) continue;
    const Work& work = row.work;
    const Numbering* numbering = work.numbering;
    const int64_t first = numbering == nullptr ? 0 : numbering->first;
    const bool one_run = numbering == nullptr || numbering->run >= work.elements;
    found.push_back({static_cast<int>(i), tensors_[row.first].device, work.compute, work.gradient, work.param_format,
                     work.moment_format, work.amsgrad,
                     work.layout == nullptr ? 0 : static_cast<int>(std::max<size_t>(1, work.layout->sizes.size())),
                     !one_run || first + work.elements > int64_t{1} << 32, work.row % block == 0, row.wide,
                     work.elements});
  }
  return found;
}

void Plan::write_device_rows(int64_t* table, int64_t* layouts) const {
  int64_t* const first_layout = layouts;
  for (const Row& row : rows_) {
    if (!row.bound || !row.on_device) continue;
    const Work& work = row.work;
    for (int o = 0; o < max_operands; ++o) table[o] = reinterpret_cast<int64_t>(work.address[o]);
    table[grad] = 0;  // write_device_step() has them
    table[column_elements] = work.elements;
    table[column_row] = work.row;
    const Numbering numbering = work.numbering == nullptr ? Numbering{0, int64_t{1} << 62, 0} : *work.numbering;
    table[column_first] = numbering.first;
    table[column_run] = numbering.run;
    table[column_stride] = numbering.stride;
    table[column_layout] = layouts - first_layout;
    table += device_columns;
    if (work.layout == nullptr) continue;
    const Layout& layout = *work.layout;
    const size_t dims = std::max<size_t>(1, layout.sizes.size());
    for (size_t k = 0; k < dims; ++k) *layouts++ = layout.sizes.empty() ? 1 : layout.sizes[k];
    for (const auto& strides : layout.strides) {
      for (size_t k = 0; k < dims; ++k) *layouts++ = k < strides.size() ? strides[k] : 0;
    }
  }
}

bool Plan::write_device_step(int64_t* table) const {
  const auto rows = static_cast<size_t>(
      std::count_if(rows_.begin(), rows_.end(), [](const Row& row) { return row.bound && row.on_device; }));
  bool changed = false;
  const auto put = [&](int64_t* to, int64_t value) {
    changed |= *to != value;
    *to = value;
  };
  for (const Row& row : rows_) {
    if (!row.bound || !row.on_device) continue;
    const auto gradient = reinterpret_cast<int64_t>(row.work.address[grad]);
    put(table, !row.active ? 0 : gradient == 0 ? 1 : gradient);  // an empty one may lie nowhere, and takes part
    if (row.active) put(table + rows, row.work.scalars);
    if (row.stream != nullptr) put(table + 2 * rows, static_cast<int64_t>(mixed(static_cast<uint64_t>(*row.stream))));
    ++table;
  }
  return changed;
}

DLDevice Plan::only_device() const {
  DLDevice only{0, 0};
  for (const Row& row : rows_) {
    if (!row.active) continue;
    if (!row.on_device) return {0, 0};
    const DLDevice device = tensors_[row.first].device;
    if (only.type != 0 && !(only == device)) return {0, 0};
    only = device;
  }
  return only;
}

bool Plan::guess() {
  if (guessed_.empty()) {
    for (size_t i = 0; i < rows_.size(); ++i) {
      Row& row = rows_[i];
      if (!row.active) continue;
      guessed_.emplace_back(static_cast<int>(i), nb::borrow(tensors_[row.first + 2].object));
      row.guessed = true;
    }
    return true;
  }
  size_t known = 0;
  for (const Row& row : rows_) {
    if (!row.active) continue;
    if (!row.guessed || known == guessed_.size() || !guessed_[known].second.is(tensors_[row.first + 2].object)) {
      return false;
    }
    ++known;
  }
  return known == guessed_.size();
}

void Plan::settle(int64_t drift, bool keep) {
  for (auto& [row, step] : guessed_) {
    rows_[static_cast<size_t>(row)].guessed = keep;
    DLTensor tensor;
    if (!read(step.ptr(), &tensor) || !on_cpu(tensor) || tensor.data == nullptr || tensor.dtype.bits != 32) continue;
    *static_cast<float*>(tensor.data) += static_cast<float>(drift);
  }
  if (!keep) guessed_.clear();
}

nb::list Plan::step_counts() const {
  nb::list found;
  for (const Row& row : rows_) {
    if (row.active) found.append(nb::make_tuple(row.group, nb::handle(tensors_[row.first + 2].object)));
  }
  return found;
}

void Plan::measure(int threads) {
  if (collect() < worth_unlocking) {
    squares_ = lucid::squares(works_, threads);
  } else {
    const nb::gil_scoped_release unlocked;
    squares_ = lucid::squares(works_, threads);
  }
}

double Plan::square_sum() const {
  std::vector<double> sums = squares_;
  return ordered_sum(sums.data(), sums.size());
}

std::vector<std::pair<int, double>> Plan::squares() const {
  std::vector<std::pair<int, double>> found;
  for (size_t k = 0; k < squares_.size(); ++k) found.emplace_back(active_[k], squares_[k]);
  return found;
}

std::vector<std::pair<int, RowObserved>> Plan::observed() const {
  std::vector<std::pair<int, RowObserved>> found;
  for (size_t k = 0; k < observed_.size(); ++k) found.emplace_back(active_[k], observed_[k]);
  return found;
}

void Plan::run(const std::vector<HostScalars>& scalars, int threads, bool observe, bool count, nb::list state_box) {
  if (unread_ && PyList_GetItem(state_box.ptr(), 1) != Py_False && !still_same(PyList_GetItem(state_box.ptr(), 0))) {
    throw std::runtime_error(
        "another thread changed the optimizer's state during step(), so nothing was updated; "
        "let one thread change it while no other steps");
  }
  for (Row& row : rows_) {
    if (row.active && !row.on_device && row.stream != nullptr) {
      row.work.key = draw_key(*row.stream, static_cast<int64_t>(*row.step) + 1);
    }
  }
  const int64_t total = collect();
  observed_.clear();
  std::vector<RowObserved>* const observed = observe ? &observed_ : nullptr;
  last_elements_ = total;
  last_threads_ = serial_ ? 1 : threads;
  if (total < worth_unlocking) {
    update(works_, scalars, threads, serial_, observed);
  } else {
    for (Row& row : rows_) {
      if (row.active) hold_slots(row);
    }
    const nb::gil_scoped_release unlocked;
    update(works_, scalars, threads, serial_, observed);
  }
  // update() throws before its first write or not at all.
  for (const Row& row : rows_) {
    if (row.active && count) *row.step += 1;
  }
  ran_ = true;
}

void Plan::drop_slots(Row& row) {
  if (!row.holds_slots) return;
  for (int k = 2; k < row.tensors; ++k) Py_DECREF(tensors_[row.first + static_cast<size_t>(k)].object);
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
  if (tensors_.size() > 2 * remembered_tensors_) compact();  // rows bound in steps that were not run
  ran_ = false;
}

}  // namespace lucid
