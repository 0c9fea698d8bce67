// The beginning and the end of a step: reads the addresses again and compares them with what was checked before.
#include "rows.h"

#include "engine.h"
#include "parallel.h"

namespace lucid {
namespace {

// After so many steps in which nobody has read the state, gather() finds out whether somebody else can still reach it;
// and if so, it tries again after so many more steps.
constexpr int quiet_steps = 8;
constexpr int quiet_steps_after_failure = 1024;

}  // namespace

Rows::Rows(nb::list groups) {
  int group = 0;
  for (nb::handle params : groups) {
    for (nb::handle param : nb::cast<nb::list>(params)) rows_.emplace_back(param.ptr(), group);
    ++group;
  }
  layouts_.resize(rows_.size());
}

Rows::~Rows() { release(); }

bool Rows::same_groups(nb::list groups) const {
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

bool Rows::same_tensor(const Tensor& known, const DLTensor& tensor) const {
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

bool Rows::overlaps(const Row& row, const void* gradient) const {
  const auto* begin = static_cast<const char*>(gradient);
  const char* end = begin + tensors_[row.first + 1].span;
  for (int k = 0; k < row.tensors; ++k) {
    const Tensor& tensor = tensors_[row.first + static_cast<size_t>(k)];
    const auto* other = static_cast<const char*>(tensor.address);
    if (tensor.role != grad && begin < other + tensor.span && other < end) return true;
  }
  return false;
}

// Whether the parameter is sharded as when it was bound, and its gradient in the same way.
bool Rows::same_spread(Row& row) {
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

// Reads the row's gradient of this step; sets `changed` if the gradient or the parameter differs from the bound row.
void Rows::gather_gradient(Row& row) {
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
  row.changed = !row.bound || !same_spread || !is_plain_tensor(gradient) || !read(gradient, &tensor) ||
                !same_tensor(tensors_[row.first + 1], tensor) || !aligned(tensor) ||
                (tensor.data == nullptr && row.work.elements > 0) || overlaps(row, tensor.data);
  // A lazily negated real gradient is the imaginary part of a conjugate. None of its strides is 1 unless it has one
  // element. So a dense gradient need not be asked, which would cost as much as everything else here.
  row.may_be_lazy |=
      row.is_complex || row.work.layout != nullptr || row.work.elements == 1 || (row.changed && is_lazy_view(gradient));
  if (!row.changed && row.may_be_lazy) row.changed = is_lazy_view(gradient);
  if (row.changed) return;
  row.work.address[grad] = tensor.data;
  if (row.wide && reinterpret_cast<uintptr_t>(tensor.data) % wide_load != 0) {
    row.wide = false;
    ++device_structure_;
  }
  row.last_gradient = row.gradient;
  row.near_gradient = near(tensor);
  row.changed =
      !read(param, &tensor) || !same_tensor(tensors_[row.first], tensor) || (row.is_complex && is_lazy_view(param));
  if (!row.changed) row.near_param = near(tensor);
}

nb::object Rows::gather(nb::list groups, nb::list state_box) try {
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
      __builtin_prefetch(ahead.last_gradient);
      ahead.near_param.prefetch();
      ahead.near_gradient.prefetch();
    }
    gather_gradient(rows_[i]);
  }
  unread_ = sealed_ && !changed_;
  if (changed_ || (!sealed_ && !gather_state(state))) {
    changed_ = true;
    for (Row& row : rows_) {
      if (!row.active) unbind(row);  // its state may have changed when it takes part again
      row.changed = row.active;
    }
  } else if (!sealed_ && ++quiet_ >= quiet_steps) {
    sealed_ = unreachable(state);
    if (!sealed_) quiet_ = quiet_steps - quiet_steps_after_failure;
  }
  nb::list changed;
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (!rows_[i].changed) continue;
    changed.append(i);
    rows_[i].active = false;  // until it is bound
  }
  return changed;
} catch (...) {
  release();
  throw;
}

void Rows::unbind(Row& row) {
  device_structure_ += row.bound && row.on_device;
  row.bound = false;
}

void Rows::hold_slots(Row& row) {
  if (row.holds_slots) return;
  for (int k = 2; k < row.tensors; ++k) Py_INCREF(tensors_[row.first + static_cast<size_t>(k)].object);
  row.holds_slots = true;
}

void Rows::drop_slots(Row& row) {
  if (!row.holds_slots) return;
  for (int k = 2; k < row.tensors; ++k) Py_DECREF(tensors_[row.first + static_cast<size_t>(k)].object);
  row.holds_slots = false;
}

void Rows::release() {
  if (!gathered_) return;
  gathered_ = false;
  for (Row& row : rows_) {
    drop_slots(row);
    if (row.gradient != nullptr) Py_DECREF(row.param);
    Py_CLEAR(row.gradient);
    row.active = row.changed = false;
  }
  if (tensors_.size() > 2 * remembered_tensors_) compact();  // rows were bound in steps that did not write
  written_ = false;
}

}  // namespace lucid
