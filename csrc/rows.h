// The rows of an optimizer's step, and what was known of them at the last step. A step begins with gather(), which
// reads the addresses again and returns the changed rows. Python checks these and binds them again. Nothing is written
// before update(). gather.cpp, bind.cpp, seal.cpp, step.cpp and device_rows.cpp implement one part each.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine.h"
#include "tensor.h"

namespace lucid {

// With thousands of small tensors, a step consists of cache misses. So what a row reads first is prefetched while this
// many rows before it are read.
constexpr size_t rows_ahead = 6;

// A step of fewer elements keeps the interpreter lock, because it takes only a fraction of a millisecond.
constexpr int64_t worth_unlocking = 1 << 19;

// The bytes that a thread of a GPU should read at once.
constexpr uintptr_t wide_load = 16;

// A row that the engine of a device updates, see Rows::device_rows().
struct DeviceRow {
  int row;
  DLDevice device;
  Type compute, gradient;
  ParamFormat param_format;
  MomentFormat moment_format;
  bool amsgrad;
  bool ema;         // an average of the weights is kept
  int dims;         // of its layout; 0 if every operand is contiguous
  bool numbered;    // its elements are not one run of numbers below 2^32
  bool whole_rows;  // each index of its first dimension has whole blocks
  bool wide;        // every address is a multiple of 16
  int64_t elements;
};

// The columns of the table of device rows, int64: addresses by Operand, then these. They are the same as
// lucid.engine.numbers.Column.
enum DeviceColumn : int {
  column_elements = max_operands,
  column_row,  // elements with the same index of the first dimension
  column_first,
  column_run,
  column_stride,
  column_layout,  // where its layout begins in the table of layouts
  device_columns = 16,
};

// How the parameter and the moments of a row are stored, and whether an average of the weights is.
struct RowFormat {
  ParamFormat param;
  MomentFormat moments;
  bool ema;
};

// A tensor of a row's state: its role (an Operand or one of the two below), and the tensor.
using RowSlot = std::pair<int, nb::object>;
constexpr int step_role = -1, stream_role = -2;

class Rows {
 public:
  // groups: the list of parameters of each group.
  explicit Rows(nb::list groups);
  ~Rows();
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;

  // Begins a step. Returns the numbers of the changed rows, which must be checked; or None if the groups have other
  // parameters than these rows. state_box: [the optimizer's state, whether somebody has read it since the last step].
  // It holds the only reference to the state; its second entry is set to False.
  nb::object gather(nb::list groups, nb::list state_box);
  // Adds row `index` to this step, with this gradient and state. slots: the step count first, then the other tensors.
  // entry: the dict that contains them, or will contain them after this step. If the parameter is sharded, the gradient
  // is the local shard. update() does not update a row `on_device`; the engine of the device does, with device_rows()
  // and the functions after it. Returns what is wrong with the tensors, or None.
  nb::object bind(size_t index, nb::handle gradient, nb::dict entry, const std::vector<RowSlot>& slots,
                  RowFormat format, Numbering numbering, bool on_device);
  // Call it after all rows are bound: throws if the state of one row shares memory with another row.
  void compare();
  // (group, step count after this step) for every set of scalars that the rows of this step need, in that order.
  std::vector<std::pair<int, double>> steps();
  // Remembers the order of the entries of `state`; returns the parameters of this step.
  nb::list before_writing(nb::dict state);
  // What the engine of a device needs to know of the rows that are bound to it, including those that are not in this
  // step.
  std::vector<DeviceRow> device_rows() const;
  // Changes if the results of device_rows() and write_device_rows() change.
  int64_t device_structure() const { return device_structure_; }
  // Writes a table of these rows, int64[rows][device_columns]; and to `layouts`, one after the other, the layouts of
  // the rows that are not contiguous: sizes, then the strides of each operand.
  void write_device_rows(int64_t* table, int64_t* layouts) const;
  // Writes what changes from step to step, int64[3][rows]: gradients' addresses (0 if the row is not in this step),
  // sets of scalars, hashes of streams. Returns whether any value has changed.
  bool write_device_step(int64_t* table) const;
  // The device of all rows of this step, if they are on one device and its engine updates them; else a device of type
  // 0.
  DLDevice only_device() const;
  // Marks the step counts of this step's rows as assumed, until the device confirms them. Returns false if those of
  // other rows are assumed; then call correct() first.
  bool assume();
  // Adds `correction` to all assumed step counts. Afterwards they are confirmed, unless `keep`.
  void correct(int64_t correction, bool keep);
  // (group, step count as a tensor) of each row of this step.
  nb::list step_counts() const;
  // Whether some rows share memory, so that they must be updated one after the other.
  bool serial() const { return serial_; }
  // Returns the words of the sum of the squares of this step's gradients, see squares() in engine.h. `kinds`: that of
  // each row, or null if all are of one.
  std::vector<int64_t> measure(int threads, double scale, const int* kinds);
  // Updates the rows of the CPU engine. If `count`, it counts the step of all rows; a captured step is not counted.
  void update(const std::vector<HostScalars>& scalars, int threads, bool observe, bool count, nb::list state_box);
  // (row, observation) of the last observed update().
  std::vector<std::pair<int, RowObserved>> observed() const;
  // Ends the step, written or not; drops the references to the gradients.
  void release();
  // Whether update() has written, since gather().
  bool written() const { return written_; }
  bool sealed() const { return sealed_; }

 private:
  // A tensor of a row; its shape and strides are in dims_.
  struct Tensor {
    PyObject* object;  // of a slot; only to compare identities, unless hold_slots() holds it
    void* address;
    DLDevice device;
    int64_t span;  // bytes from the first element to the end of the last
    uint32_t shape, strides;
    DLDataType type;
    int16_t ndim;
    int16_t role;  // an Operand, step_role or stream_role
  };
  // How a sharded parameter is sharded: its spec, and the last spec of a gradient that was equal.
  struct Shard {
    nb::object spec, gradient_spec;
  };

  // What every pass over the rows reads comes first, in one cache line.
  struct alignas(64) Row {
    PyObject* param;  // this and the next are compared by identity; param is owned from gather() to release()
    PyTypeObject* param_type;
    PyObject* gradient = nullptr;
    float* step = nullptr;
    const int64_t* stream = nullptr;
    int group;
    int tensors = 0;
    bool bound = false;
    bool active = false;   // takes part in this step
    bool changed = false;  // since it was bound, so it must be checked
    bool holds_slots = false;
    bool is_complex = false;
    bool on_device = false;    // updated by the engine of a device
    bool assumed = false;      // on a device: its step count is in assumed_
    bool wide = false;         // on a device: every address is a multiple of 16
    bool may_be_lazy = false;  // its gradient may be lazily conjugated or negated, so each step asks
    Work work = {};
    size_t first = 0;  // in tensors_: parameter, gradient, step, then the other slots
    Near near_param, near_gradient;
    PyObject* last_gradient = nullptr;  // only to prefetch
    PyObject* entry = nullptr;          // compared by identity
    std::unique_ptr<Shard> shard;       // if the parameter is sharded
    Numbering numbering = {};

    Row(PyObject* param_, int group_) : param(param_), param_type(Py_TYPE(param_)), group(group_) {}
  };

  // The contents of `state` at the last walk: an entry, and its `slots` slots in seen_slots_.
  struct SeenEntry {
    PyObject *key, *entry;
    Py_ssize_t slots;
    int row;  // -1 if it belongs to no row
  };
  struct SeenSlot {
    PyObject *key, *value;
    int tensor;      // which tensor of the row, or -1
    uintptr_t near;  // the address of its shape, only to prefetch
  };

  bool same_groups(nb::list groups) const;
  bool same_spread(Row& row);
  void gather_gradient(Row& row);
  bool gather_state(PyObject* state);
  void hold_slots(Row& row);  // until release()
  void unbind(Row& row);
  void drop_slots(Row& row);
  void remember(PyObject* state);
  bool unreachable(PyObject* state) const;
  bool still_same(PyObject* state);
  bool same_tensor(const Tensor& known, const DLTensor& tensor) const;
  bool overlaps(const Row& row, const void* gradient) const;
  void compact();
  // Parts of bind(): read the tensors, make the row's work, make its layout, remember the row.
  const char* read_all(const Row& row, const std::vector<RowSlot>& found, std::vector<DLTensor>& tensors,
                       bool* wide) const;
  const char* work_of(Row& row, const std::vector<RowSlot>& found, const std::vector<DLTensor>& tensors,
                      RowFormat format, Work* work) const;
  const char* lay_out(size_t index, const std::vector<RowSlot>& found, const std::vector<DLTensor>& tensors,
                      Work* work);
  void keep(Row& row, nb::handle entry, const std::vector<RowSlot>& found, const std::vector<DLTensor>& tensors);
  // Puts the CPU engine's rows of this step into works_ and active_; returns how many elements they have.
  int64_t collect();
  // Returns a tensor as it was read; appends its shape and strides to dims_.
  Tensor known(const DLTensor& tensor, PyObject* object, int16_t role);

  std::vector<Row> rows_;
  std::vector<Layout> layouts_;  // by row
  std::vector<Tensor> tensors_;
  std::vector<int64_t> dims_;
  size_t remembered_tensors_ = 0;  // after the last compact()
  std::vector<SeenEntry> seen_entries_;
  std::vector<SeenSlot> seen_slots_;
  std::vector<const Work*> works_;
  std::vector<int> active_;                          // the rows of works_
  std::vector<std::pair<int, nb::object>> assumed_;  // rows, and their step counts
  std::vector<RowObserved> observed_;
  bool changed_ = false;   // something in the state has changed since the last remember()
  bool sealed_ = false;    // the state was unreachable() after it was last read, so it need not be read
  bool unread_ = false;    // this step has not read the state, because it was sealed
  int quiet_ = 0;          // steps since somebody last read the state
  bool serial_ = false;    // some rows share memory
  bool gathered_ = false;  // a step has begun and is not released yet
  bool written_ = false;
  int64_t device_structure_ = 0;
  int64_t last_elements_ = 0;  // this and the next: of the last step
  int last_threads_ = 1;
};

}  // namespace lucid
