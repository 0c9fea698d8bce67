// The rows of an optimizer's step and what was known of them at the last one. A step begins with gather(),
// which reads every address anew and names the rows that are not as they were; Python checks those and binds
// them again. Nothing is written before run().
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine.h"
#include "tensor.h"

namespace lucid {

// A row that another engine updates, see Plan::device_rows().
struct DeviceRow {
  int row;
  DLDevice device;
  Type compute, gradient;
  ParamFormat param_format;
  MomentFormat moment_format;
  bool amsgrad;
  int dims;         // of its layout; 0 where every operand is contiguous
  bool numbered;    // its elements do not simply have the numbers below 2^32 from the first on
  bool whole_rows;  // a row of its own consists of whole blocks
  bool wide;        // every address is a multiple of 16
  int64_t elements;
};

// The columns of the table of such rows, in int64: addresses by Operand, then these.
enum DeviceColumn : int {
  column_elements = max_operands,
  column_row,  // elements of one index of the first dimension
  column_first,
  column_run,
  column_stride,
  column_layout,  // where its layout begins
  device_columns = 16,
};

class Plan {
 public:
  // groups: the lists of parameters, as in param_groups.
  explicit Plan(nb::list groups);
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Row numbers that need a look before this step; none where the groups hold other parameters than planned.
  // state_box: the optimizer's state, whose only holder it is, and whether anyone has asked for it since the
  // last step, which is set to False.
  nb::object gather(nb::list groups, nb::list state_box);
  // Row `index` takes part in this step with this gradient and state. slots: its tensors by key, which tells the
  // format, "step" among them; `entry`, the dict that they lie in (or will, when this step is run). Of a parameter that
  // is spread over processes the gradient is what is here. A row `on_device` is not updated by run(): device_rows() and
  // what follows it are for the engine that does. Returns what is wrong with them, or nothing.
  nb::object bind(size_t index, nb::handle gradient, nb::dict entry, nb::dict slots, Numbering numbering,
                  bool on_device);
  // Once all rows are bound: throws where the state of one lies in the memory of another.
  void compare();
  // Takes over from `state` in which order its entries stand.
  void remember(nb::dict state);
  // (group, step count after this step) for every set of scalars that run() will want, in that order.
  std::vector<std::pair<int, double>> steps();
  nb::list params() const;
  // What an engine of another device needs of the rows that are bound to it, whether or not they take part in this
  // step.
  std::vector<DeviceRow> device_rows() const;
  // Changes whenever what device_rows() and write_device_rows() give does.
  int64_t device_structure() const { return device_structure_; }
  // Writes a table of them, int64[rows][device_columns], and behind it, one after the other, the layouts of those that
  // are not contiguous: sizes, then the strides of each operand.
  void write_device_rows(int64_t* table, int64_t* layouts) const;
  // Writes what changes from step to step: gradients' addresses (0 where the row takes no part), the set of scalars,
  // the hash of the stream of its draws, int64[3][rows]; returns whether anything is not as it was there.
  bool write_device_step(int64_t* table) const;
  // Where all rows of this step are if that is one device of another engine; else a device of type 0.
  DLDevice only_device() const;
  // Remembers that the step counts of this step's rows are the device's to decide, and are so far guessed. False where
  // those of other rows are: then settle() has to come first.
  bool guess();
  // Adds to all step counts that were guessed what they are off by; they are right then, and no guess unless `keep`.
  void settle(int64_t drift, bool keep);
  // (group, step count as a tensor) of the rows of this step.
  nb::list step_counts() const;
  // Whether some rows share memory, so that they are updated one after the other.
  bool serial() const { return serial_; }
  // Sums up the squares of this step's gradients; what they are together; what they are in each row, (row, sum).
  void measure(int threads);
  double square_sum() const;
  std::vector<std::pair<int, double>> squares() const;
  // Updates the rows of this engine and counts the step of all, but where it is only captured to be run later.
  void run(const std::vector<HostScalars>& scalars, int threads, bool observe, bool count, nb::list state_box);
  // (row, what its step was like) of the last run() that was to observe.
  std::vector<std::pair<int, RowObserved>> observed() const;
  // Ends the step, run or not; lets go of the gradients.
  void release();
  bool ran() const { return ran_; }
  bool sealed() const { return sealed_; }

 private:
  // A tensor of a row: its shape and strides stand in dims_.
  struct Tensor {
    PyObject* object;  // of a slot; identity only, but while held
    void* address;
    DLDevice device;
    int64_t span;  // bytes from the first to behind the last element
    uint32_t shape, strides;
    DLDataType type;
    int16_t ndim;
    int16_t role;  // an Operand, or one of the two below
  };
  static constexpr int16_t step_role = -1, stream_role = -2;

  // What is here of a parameter, and how it is spread: its own spec, and the last that said the same of a gradient.
  struct Shard {
    nb::object spec, gradient_spec;
  };

  struct Row {
    PyObject* param;  // identities: compared, and owned from gather() to release() only
    PyTypeObject* param_type;
    PyObject* entry = nullptr;
    PyObject* gradient = nullptr;
    std::unique_ptr<Shard> shard;  // where the parameter is spread over processes
    float* step = nullptr;
    const int64_t* stream = nullptr;
    Work work = {};
    Numbering numbering = {};
    size_t first = 0;  // in tensors_: parameter, gradient, step, then the other slots
    int tensors = 0;
    int group;
    uintptr_t near_param = 0, near_gradient = 0;  // where torch keeps the shapes: to prefetch only
    bool bound = false;
    bool active = false;
    bool look = false;
    bool holds_slots = false;
    bool is_complex = false;
    bool on_device = false;    // updated by another engine, from what device_rows() tells
    bool guessed = false;      // of these: in guessed_
    bool wide = false;         // of these: every address is a multiple of 16
    bool may_be_lazy = false;  // its gradient, conjugated or negated: then it is asked at each step

    Row(PyObject* param_, int group_) : param(param_), param_type(Py_TYPE(param_)), group(group_) {}
  };

  // What stood in `state` when it was last walked through: one entry, then `slots` slots in seen_slots_.
  struct SeenEntry {
    PyObject *key, *entry;
    Py_ssize_t slots;
    int row;  // -1: none of ours
  };
  struct SeenSlot {
    PyObject *key, *value;
    int tensor;      // which of the row's; -1: none of ours
    uintptr_t near;  // as near_param
  };

  bool same_groups(nb::list groups) const;
  bool same_spread(Row& row);
  void gather_gradient(Row& row);
  bool gather_state(PyObject* state);
  void hold_slots(Row& row);  // until release()
  void unbind(Row& row);
  void drop_slots(Row& row);
  bool unreachable(PyObject* state) const;
  bool still_same(PyObject* state);
  bool same_tensor(const Tensor& known, const DLTensor& tensor) const;
  bool overlaps(const Row& row, const void* gradient) const;
  void compact();
  // The rows of this step into works_ and active_; how many elements they have.
  int64_t collect();
  // A tensor as it was read, with its shape and strides appended to dims_.
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
  std::vector<std::pair<int, nb::object>> guessed_;  // rows, and their step counts
  std::vector<double> squares_;                      // by active row, since measure()
  std::vector<RowObserved> observed_;
  bool changed_ = false;   // since the last remember()
  bool sealed_ = false;    // unreachable() since the state was last read, so that it need not be read
  bool unread_ = false;    // in this step, since it was sealed
  int quiet_ = 0;          // steps since the state was last seen by anyone
  bool serial_ = false;    // some rows share memory
  bool gathered_ = false;  // a step has begun and is not yet released
  bool ran_ = false;
  int64_t device_structure_ = 0;
  int64_t last_elements_ = 0;  // of the last step, and its threads
  int last_threads_ = 1;
};

}  // namespace lucid
