// Turns a row that Python has checked into what the engines need: addresses, layout, format.
#include "rows.h"

#include <algorithm>
#include <utility>

namespace lucid {
namespace {

// Whether a parameter of this type may be stored in this format.
bool stores(ParamFormat format, Type type) {
  switch (type) {
    case Type::bfloat16:
      return format == ParamFormat::bfloat16 || format == ParamFormat::bfloat16_residual ||
             format == ParamFormat::bfloat16_drawn;
    case Type::float16:
      return format == ParamFormat::float16 || format == ParamFormat::float16_master;
    default:
      return format == ParamFormat::plain;
  }
}

// Whether moments of this format may have this dtype.
bool holds(MomentFormat format, Type compute, DLDataType dtype) {
  Type type;
  switch (format) {
    case MomentFormat::eight_bit:
      return dtype.bits == 8;
    case MomentFormat::bfloat16:
      return real_type(dtype, &type) && type == Type::bfloat16;
    default:
      return real_type(dtype, &type) && type == compute;
  }
}

}  // namespace

Rows::Tensor Rows::known(const DLTensor& tensor, PyObject* object, int16_t role) {
  const auto shape = static_cast<uint32_t>(dims_.size());
  dims_.insert(dims_.end(), tensor.shape, tensor.shape + tensor.ndim);
  dims_.insert(dims_.end(), tensor.strides, tensor.strides + tensor.ndim);
  return {object,        tensor.data,
          tensor.device, span_in_bytes(tensor),
          shape,         shape + static_cast<uint32_t>(tensor.ndim),
          tensor.dtype,  static_cast<int16_t>(tensor.ndim),
          role};
}

// Reads all tensors of a row; returns why an engine cannot use their memory, or null. Sets `wide` to false if an
// address of a row on a device is not a multiple of wide_load.
const char* Rows::read_all(const Row& row, const std::vector<RowSlot>& found, std::vector<DLTensor>& tensors,
                           bool* wide) const {
  for (size_t k = 0; k < found.size(); ++k) {
    DLTensor& tensor = tensors[k];
    const bool on_host = found[k].first < 0 || !row.on_device;
    if (!read(local_of(found[k].second.ptr()), &tensor) || !(on_host ? on_cpu(tensor) : has_addresses(tensor)) ||
        tensor.byte_offset != 0) {
      return on_host ? "its memory cannot be read as a plain CPU tensor's"
                     : "its memory cannot be read as a plain tensor's";
    }
    if (!on_host) *wide &= reinterpret_cast<uintptr_t>(tensor.data) % wide_load == 0;
    if (tensor.data == nullptr && elements(tensor) > 0) return "it, its gradient or its state has no memory";
    if (!aligned(tensor)) return "an address is not a multiple of its element's size";
  }
  return nullptr;
}

// Fills in the work of a row, all but its layout; returns why that is not possible, or null.
const char* Rows::work_of(Row& row, const std::vector<RowSlot>& found, const std::vector<DLTensor>& tensors,
                          RowFormat format, Work* work) const {
  const DLTensor& parameter = tensors[0];
  Type type;
  if (!real_type(parameter.dtype, &type) || !real_type(tensors[1].dtype, &work->gradient)) {
    return "no engine knows its dtype";
  }
  if (!stores(format.param, type)) return "its format is not one of its dtype";
  const bool is_complex = lucid::is_complex(parameter.dtype);
  work->compute = type == Type::float64 ? type : Type::float32;
  work->own_gradient = work->gradient == type;
  work->param_format = format.param;
  work->moment_format = format.moments;
  work->draws = format.moments != MomentFormat::plain || format.param == ParamFormat::bfloat16_drawn || format.ema;
  work->elements = elements(parameter) * (is_complex ? 2 : 1);
  work->row = parameter.ndim == 0 || parameter.shape[0] == 0 ? work->elements : work->elements / parameter.shape[0];
  work->numbering = row.numbering.first == 0 && row.numbering.run >= work->elements ? nullptr : &row.numbering;
  for (size_t k = 0; k < found.size(); ++k) {
    const int role = found[k].first;
    if (role < 0) continue;
    work->address[role] = tensors[k].data;
    work->amsgrad |= role == max_exp_avg_sq;
    if (role < shaped_operands) work->size[role] = static_cast<int8_t>(tensors[k].dtype.bits / (is_complex ? 16 : 8));
    if ((role == exp_avg || role == exp_avg_sq) && !holds(format.moments, work->compute, tensors[k].dtype)) {
      return "no engine knows the dtype of its state";
    }
    if (role == ema && !holds(MomentFormat::plain, work->compute, tensors[k].dtype)) {
      return "no engine knows the dtype of its average";
    }
  }
  return nullptr;
}

// Makes the layout of a row; returns why an engine cannot use it, or null.
const char* Rows::lay_out(size_t index, const std::vector<RowSlot>& found, const std::vector<DLTensor>& tensors,
                          Work* work) {
  const DLTensor& parameter = tensors[0];
  const bool is_complex = lucid::is_complex(parameter.dtype);
  const int ndim = parameter.ndim + is_complex;  // a complex number is two reals, one after the other
  std::vector<int64_t> shape(parameter.shape, parameter.shape + parameter.ndim);
  if (is_complex) shape.push_back(2);
  std::vector<int64_t> strides(static_cast<size_t>(shaped_operands * ndim));
  const int64_t* strides_of[shaped_operands] = {};
  for (size_t k = 0; k < found.size(); ++k) {
    const int role = found[k].first;
    if (role < 0 || role >= shaped_operands) continue;
    int64_t* to = strides.data() + role * ndim;
    for (int dim = 0; dim < parameter.ndim; ++dim) to[dim] = tensors[k].strides[dim] * (is_complex ? 2 : 1);
    if (is_complex) to[parameter.ndim] = 1;
    strides_of[role] = to;
  }
  Layout& layout = layouts_[index];
  layout = Layout::of(ndim, shape.data(), strides_of, work->draws);
  if (work->moment_format == MomentFormat::eight_bit) {
    for (const int codes : {exp_avg, exp_avg_sq}) {
      if (!layout.contiguous[codes]) return "its codes do not lie in row-major order";
    }
    const int64_t blocks = work->elements / std::max<int64_t>(work->row, 1) * ((work->row + block - 1) / block);
    for (size_t k = 0; k < found.size(); ++k) {
      if (found[k].first < shaped_operands) continue;
      if (elements(tensors[k]) != blocks || span_in_bytes(tensors[k]) != 4 * blocks) {
        return "its scales are not one for each block";
      }
    }
  }
  const bool readable = rows_[index].on_device || work->gradient == work->compute || work->own_gradient;
  work->layout = readable && layout.all_contiguous() ? nullptr : &layout;
  return nullptr;
}

// Remembers what gather() compares the row with in the next step.
void Rows::keep(Row& row, nb::handle entry, const std::vector<RowSlot>& found, const std::vector<DLTensor>& tensors) {
  changed_ |= row.entry != entry.ptr() || row.tensors != static_cast<int>(found.size());
  for (size_t k = 0; k < found.size() && !changed_; ++k) {
    const Tensor& before = tensors_[row.first + k];
    changed_ = before.role != found[k].first ||
               (k != 1 && (before.address != tensors[k].data || !same_tensor(before, tensors[k]))) ||
               (k > 1 && before.object != found[k].second.ptr());
  }
  row.entry = entry.ptr();
  row.first = tensors_.size();
  row.tensors = static_cast<int>(found.size());
  row.step = static_cast<float*>(tensors[2].data);
  row.stream = nullptr;
  for (size_t k = 0; k < found.size(); ++k) {
    const auto role = static_cast<int16_t>(found[k].first);
    tensors_.push_back(known(tensors[k], found[k].second.ptr(), role));
    if (role == stream_role) row.stream = static_cast<const int64_t*>(tensors[k].data);
  }
}

nb::object Rows::bind(size_t index, nb::handle gradient, nb::dict entry, const std::vector<RowSlot>& slots,
                      RowFormat format, Numbering numbering, bool on_device) {
  Row& row = rows_.at(index);
  drop_slots(row);
  unbind(row);
  row.on_device = row.wide = on_device;
  row.numbering = numbering;
  std::vector<RowSlot> found = {{param, nb::borrow(row.param)}, {grad, nb::borrow(gradient)}};
  found.insert(found.end(), slots.begin(), slots.end());
  if (slots.empty() || slots[0].first != step_role) return nb::str("it has no step count");

  std::vector<DLTensor> tensors(found.size());
  Work work = {};
  const char* fault = read_all(row, found, tensors, &row.wide);
  if (fault == nullptr) fault = work_of(row, found, tensors, format, &work);
  if (fault == nullptr) fault = lay_out(index, found, tensors, &work);
  if (fault != nullptr) return nb::str(fault);

  row.work = work;
  row.is_complex = is_complex(tensors[0].dtype);
  row.shard.reset();
  if (is_sharded(row.param)) row.shard.reset(new Shard{nb::steal(spec_of(row.param)), {}});
  keep(row, entry, found, tensors);
  Py_INCREF(gradient.ptr());
  Py_XDECREF(std::exchange(row.gradient, gradient.ptr()));
  hold_slots(row);
  sealed_ &= !changed_;
  device_structure_ += on_device;
  row.bound = true;
  row.active = true;
  row.changed = false;
  return nb::none();
}

void Rows::compare() {
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

// Removes the gaps that rows have left when they were bound again.
void Rows::compact() {
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

}  // namespace lucid
