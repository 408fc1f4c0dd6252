// Draw samples with an exported student (form `sampler`) by onnxruntime's C++ API.
//
//   onnx_inference student.onnx samples.pgm 0 3 1 4             one sample for each label; the noise is that of seed 0
//   onnx_inference student.onnx samples.f32 noise.f32 3 1 4     the noise is read: raw float32 [labels, C, H, W]
//
// samples.pgm (one channel) and samples.ppm (three, or a file with a decoder) show the samples side by side; by
// any other name the file holds raw numbers: float32 [labels, C, H, W], or uint8 [labels, height, width, 3] of a file
// with a decoder.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <regex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "standard_normal.h"

namespace {

using Shape = std::vector<std::int64_t>;

std::uint8_t level(float value) {
  return static_cast<std::uint8_t>(std::lrint((std::clamp(value, -1.0f, 1.0f) + 1.0f) * 127.5f));
}

template <typename T>
bool read_number(const std::string& text, T& number) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  return error == std::errc() && end == text.data() + text.size();
}

std::vector<float> start_noise(const std::string& seed_or_file, std::size_t count, std::size_t size) {
  std::vector<float> noise(count * size);
  std::uint64_t seed = 0;
  if (read_number(seed_or_file, seed)) {
    for (std::size_t i = 0; i < count; ++i) pyard::standard_normal(seed, i, &noise[i * size], size);
    return noise;
  }
  const auto bytes = static_cast<std::streamsize>(noise.size() * sizeof(float));
  std::ifstream file(seed_or_file, std::ios::binary | std::ios::ate);
  if (!file || file.tellg() != std::streamoff(bytes))
    throw std::runtime_error(seed_or_file + ": expected a seed, or a file of " + std::to_string(bytes) +
                             " bytes of noise");
  file.seekg(0).read(reinterpret_cast<char*>(noise.data()), bytes);
  return noise;
}

// The samples side by side: [B, C, H, W] floats, or [B, H, W, 3] levels, to [H, B * W, C] levels.
std::vector<std::uint8_t> picture(const Ort::Value& samples, const Shape& shape, bool levels) {
  const std::int64_t B = shape[0], C = shape[levels ? 3 : 1], H = shape[levels ? 1 : 2], W = shape[levels ? 2 : 3];
  std::vector<std::uint8_t> pixels;
  for (std::int64_t y = 0; y < H; ++y)
    for (std::int64_t b = 0; b < B; ++b)
      for (std::int64_t x = 0; x < W; ++x)
        for (std::int64_t c = 0; c < C; ++c)
          pixels.push_back(levels ? samples.GetTensorData<std::uint8_t>()[((b * H + y) * W + x) * C + c]
                                  : level(samples.GetTensorData<float>()[((b * C + c) * H + y) * W + x]));
  return pixels;
}

void write(const std::filesystem::path& path, const Ort::Value& samples) {
  const auto info = samples.GetTensorTypeAndShapeInfo();
  const Shape shape = info.GetShape();
  const bool levels = info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  const std::int64_t C = shape[levels ? 3 : 1], H = shape[levels ? 1 : 2], W = shape[levels ? 2 : 3];
  std::ofstream file(path, std::ios::binary);
  if (path.extension() == ".pgm" || path.extension() == ".ppm") {
    if (C != (path.extension() == ".pgm" ? 1 : 3))
      throw std::runtime_error("the samples have " + std::to_string(C) + " channels");
    file << (C == 1 ? "P5" : "P6") << "\n" << shape[0] * W << " " << H << "\n255\n";
    const std::vector<std::uint8_t> pixels = picture(samples, shape, levels);
    file.write(reinterpret_cast<const char*>(pixels.data()), static_cast<std::streamsize>(pixels.size()));
  } else {
    const std::size_t bytes = info.GetElementCount() * (levels ? 1 : sizeof(float));
    file.write(static_cast<const char*>(samples.GetTensorRawData()), static_cast<std::streamsize>(bytes));
  }
  if (!file.flush()) throw std::runtime_error(path.string() + " cannot be written");
}

void run(const std::filesystem::path& model, const std::filesystem::path& out, const std::string& seed_or_file,
         std::vector<std::int64_t> labels) {
  Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "pyard");
  Ort::Session session(env, model.c_str(), Ort::SessionOptions());
  Ort::AllocatorWithDefaultOptions allocator;
  const auto metadata = session.GetModelMetadata().LookupCustomMetadataMapAllocated("pyard", allocator);
  const std::string facts = metadata ? metadata.get() : "";
  std::smatch classes;
  if (!std::regex_search(facts, classes, std::regex("\"num_classes\": ([0-9]+)")) ||
      facts.find("\"form\": \"sampler\"") == std::string::npos)
    throw std::runtime_error(model.string() +
                             " is no student of the form 'sampler', written by python -m pyard.export");
  for (const std::int64_t label : labels)
    if (label < 0 || label >= std::stoll(classes[1]))
      throw std::runtime_error("label " + std::to_string(label) + ": the student has " + classes[1].str() + " classes");

  const auto noise_type = session.GetInputTypeInfo(0);  // "noise", float32 [batch, C, H, W]
  Shape shape = noise_type.GetTensorTypeAndShapeInfo().GetShape(), count{static_cast<std::int64_t>(labels.size())};
  shape[0] = count[0];
  std::vector<float> noise =
      start_noise(seed_or_file, labels.size(), static_cast<std::size_t>(shape[1] * shape[2] * shape[3]));
  const Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const Ort::Value inputs[] = {
      Ort::Value::CreateTensor<float>(memory, noise.data(), noise.size(), shape.data(), shape.size()),
      Ort::Value::CreateTensor<std::int64_t>(memory, labels.data(), labels.size(), count.data(), count.size())};
  const char* input_names[] = {"noise", "label"};
  const char* output_names[] = {"sample"};
  const auto outputs = session.Run(Ort::RunOptions(), input_names, inputs, 2, output_names, 1);
  write(out, outputs[0]);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) {
    std::cerr << "usage: " << argv[0] << " student.onnx samples.(pgm|ppm|f32) (seed|noise.f32) label...\n";
    return 2;
  }
  try {
    std::vector<std::int64_t> labels(static_cast<std::size_t>(argc - 4));
    for (int i = 4; i < argc; ++i)
      if (!read_number(argv[i], labels[i - 4]))
        throw std::runtime_error("label " + std::string(argv[i]) + ": expected a whole number");
    run(argv[1], argv[2], argv[3], labels);
  } catch (const std::exception& error) {  // Ort::Exception is one
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
