// The Python module pyard._trajectory: the gatherer for numpy buffers. Knows no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>  // vectors, strings and tuples of the layout
#include <unistd.h>

#include <tuple>

#include "trajectory/bus_error.h"
#include "trajectory/gatherer.h"
#include "trajectory/shard.h"

namespace py = pybind11;

namespace pyard::trajectory {
namespace {

using Layout = std::vector<std::tuple<std::string, std::string, std::vector<uint64_t>>>;  // (name, dtype, shape)

std::vector<TensorLayout> layout_of(const Layout& layout) {
  std::vector<TensorLayout> tensors;
  for (const auto& [name, dtype, shape] : layout) tensors.push_back({name, dtype_of(dtype), shape});
  return tensors;
}

// Owns what the pool writes to, and lets nobody else have it before the pool is done.
class Ticket {
 public:
  Ticket(std::shared_ptr<Gatherer> gatherer, std::shared_ptr<Batch> batch, py::object frames, py::object labels)
      : gatherer_(std::move(gatherer)),
        batch_(std::move(batch)),
        frames_(std::move(frames)),
        labels_(std::move(labels)) {}

  ~Ticket() {
    const py::gil_scoped_release release;
    gatherer_->abandon(batch_);
  }

  void wait() {
    const py::gil_scoped_release release;
    gatherer_->wait(batch_);
  }

 private:
  std::shared_ptr<Gatherer> gatherer_;
  std::shared_ptr<Batch> batch_;
  py::object frames_, labels_;
};

std::shared_ptr<Gatherer> make_gatherer(const std::vector<std::string>& paths, const std::vector<uint64_t>& counts,
                                        uint64_t shard_size, const Layout& layout, const std::string& target,
                                        const std::string& output, int64_t num_classes, size_t num_threads) {
  const StoreLayout store{paths, counts, shard_size, layout_of(layout), target, dtype_of(output), num_classes};
  const pid_t owner = getpid();
  const py::gil_scoped_release release;
  // A forked child has none of the threads: it must not wait for them, so there the gatherer is never destroyed.
  return {new Gatherer(store, num_threads), [owner](Gatherer* gatherer) {
            if (getpid() == owner) delete gatherer;
          }};
}

std::unique_ptr<Ticket> submit(const std::shared_ptr<Gatherer>& gatherer,
                               const py::array_t<int64_t, py::array::c_style>& indices, const py::array& frames,
                               const py::array& labels) {
  const uint64_t rows = static_cast<uint64_t>(indices.size());
  if (!frames.writeable() || !(frames.flags() & py::array::c_style) ||
      static_cast<uint64_t>(frames.nbytes()) != rows * gatherer->frame_bytes()) {
    throw InputError("frames: expected a writable C-contiguous array of " +
                     std::to_string(rows * gatherer->frame_bytes()) + " bytes, found " +
                     std::to_string(frames.nbytes()));
  }
  if (!labels.writeable() || !(labels.flags() & py::array::c_style) || !py::isinstance<py::array_t<int64_t>>(labels) ||
      static_cast<uint64_t>(labels.size()) != rows) {
    throw InputError("labels: expected a writable C-contiguous int64 array of " + std::to_string(rows));
  }
  auto* bytes = static_cast<uint8_t*>(const_cast<void*>(frames.data()));
  auto* classes = static_cast<int64_t*>(const_cast<void*>(labels.data()));
  std::vector<int64_t> samples(indices.data(), indices.data() + rows);
  return std::make_unique<Ticket>(gatherer, gatherer->submit(std::move(samples), bytes, classes), frames, labels);
}

std::vector<uint64_t> parse(const py::bytes& file, const Layout& layout) {
  const std::string_view content = file;
  return parse_shard(reinterpret_cast<const uint8_t*>(content.data()), content.size(), layout_of(layout));
}

}  // namespace
}  // namespace pyard::trajectory

PYBIND11_MODULE(_trajectory, module) {
  using namespace pyard::trajectory;
  module.doc() = "Native reader of trajectory stores; use pyard.trajectories.TrajectoryReader.";
  py::class_<Ticket>(module, "Ticket", "A batch that is being gathered.")
      .def("wait", &Ticket::wait, "Return when the buffers are full; ValueError if they cannot be.");
  py::class_<Gatherer, std::shared_ptr<Gatherer>>(module, "Gatherer", "Maps a store and gathers samples with threads.")
      .def(py::init(&make_gatherer), py::kw_only(), py::arg("paths"), py::arg("counts"), py::arg("shard_size"),
           py::arg("layout"), py::arg("target"), py::arg("output"), py::arg("num_classes"), py::arg("num_threads"))
      .def("submit", &submit, py::arg("indices"), py::arg("frames"), py::arg("labels"),
           "Start to gather samples into frames [B, 1 + S, C, H, W] and labels [B], which stay referenced meanwhile.");
  module.def("exit_on_bus_errors", &exit_on_bus_errors, py::arg("program"),
             "End the process in one line when a mapped file cannot be read; the line begins with `program`.");
  module.def(
      "parse_shard", &parse, py::arg("file"), py::arg("layout"),
      "Where in a safetensors file each tensor of a layout begins; ValueError if the header says anything else.");
}
