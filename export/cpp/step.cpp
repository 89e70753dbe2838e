// One denoiser call of an exported network by ONNX Runtime's C API.
//
//     step GRAPH INPUTS NOISE.npy
//
// GRAPH: a bundle, or a denoiser's .onnx file. INPUTS: a folder with NAME.npy for every input of
// the graph. What the arrays hold: README.md next to this file.

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace fs = std::filesystem;

namespace {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

using Shape = std::vector<int64_t>;

struct Kind {
    ONNXTensorElementDataType type;
    const char* descr;  // as .npy files name it
    size_t bytes;
};

// what graphs read and write; NumPy has no bfloat16, which the shares of a bfloat16 export are
constexpr Kind kinds[] = {
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, "<f4", 4},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, "<f2", 2},
};

struct Array {
    Kind kind;
    Shape shape;
    std::vector<char> data;  // row-major
};

size_t count(const Shape& shape) {
    return std::accumulate(shape.begin(), shape.end(), size_t{1}, std::multiplies<>());
}

std::string text(const Shape& shape, const std::vector<std::string>& names = {}) {
    std::string joined;
    for (size_t i = 0; i < shape.size(); ++i) {
        joined += i ? ", " : "";
        // an axis that varies has no size, but a name
        joined += shape[i] < 0 && i < names.size() ? names[i] : std::to_string(shape[i]);
    }
    return "[" + joined + "]";
}

// ---- .npy files ----

std::string field(const std::string& header, const std::string& name, const fs::path& path) {
    const size_t key = header.find("'" + name + "':");
    if (key == std::string::npos) throw Error(path.string() + ": its header has no " + name);
    const size_t begin = header.find_first_not_of(' ', key + name.size() + 3);
    const size_t end = header.find_first_of(name == "shape" ? ")" : ",", begin);
    if (end == std::string::npos) {
        throw Error(path.string() + ": the " + name + " in its header is damaged");
    }
    return header.substr(begin, end - begin);
}

std::string npy_header(std::ifstream& file, const fs::path& path) {
    char start[10] = {};
    file.read(start, sizeof start);
    if (!file || std::string(start, 6) != "\x93NUMPY" || start[6] != 1) {
        throw Error(path.string() +
                    " is not an .npy file of version 1.0: write it with numpy.save");
    }
    const auto byte = [&](int i) { return static_cast<unsigned char>(start[i]); };
    std::string header(byte(8) + 256 * byte(9), ' ');
    file.read(header.data(), static_cast<std::streamsize>(header.size()));
    if (!file) throw Error(path.string() + " ends inside its header: write it again");
    return header;
}

Array read_npy(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw Error("cannot read " + path.string() + ": write it with numpy.save");
    const std::string header = npy_header(file, path);
    const std::string descr = field(header, "descr", path);
    Array array{};
    for (const Kind& kind : kinds) {
        if (descr == "'" + std::string(kind.descr) + "'") array.kind = kind;
    }
    if (array.kind.bytes == 0) {
        throw Error(path.string() + " is of type " + descr + ": use float32 or float16");
    }
    if (field(header, "fortran_order", path) != "False") {
        throw Error(path.string() + " is column-major: save numpy.ascontiguousarray of it");
    }
    const std::string sizes = field(header, "shape", path);
    for (size_t at = 0; (at = sizes.find_first_of("0123456789", at)) != std::string::npos;) {
        size_t used = 0;
        array.shape.push_back(std::stoll(sizes.substr(at), &used));
        at += used;
    }
    const size_t begin = static_cast<size_t>(file.tellg());
    const size_t bytes = count(array.shape) * array.kind.bytes;
    if (fs::file_size(path) - begin != bytes) {
        throw Error(path.string() + " does not have the length of its shape " + text(array.shape) +
                    ": write it again");
    }
    array.data.resize(bytes);
    file.read(array.data.data(), static_cast<std::streamsize>(bytes));
    return array;
}

void write_npy(const fs::path& path, const Kind& kind, const Shape& shape, const void* data) {
    const std::string sizes = text(shape);
    std::string header = "{'descr': '" + std::string(kind.descr) +
                         "', 'fortran_order': False, 'shape': (" +
                         sizes.substr(1, sizes.size() - 2) + ",), }";
    // the values begin on a multiple of 64 bytes
    header.append(63 - (10 + header.size()) % 64, ' ');
    header += '\n';
    std::ofstream file(path, std::ios::binary);
    file.write("\x93NUMPY\x01\x00", 8);
    file.put(static_cast<char>(header.size() % 256)).put(static_cast<char>(header.size() / 256));
    file << header;
    file.write(static_cast<const char*>(data),
               static_cast<std::streamsize>(count(shape) * kind.bytes));
    if (!file.flush()) throw Error("cannot write " + path.string());
}

// ---- ONNX Runtime ----

const OrtApi& api() {
    static const OrtApi* found = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    if (found == nullptr) {
        throw Error("ONNX Runtime " + std::string(OrtGetApiBase()->GetVersionString()) +
                    " is older than the headers of this program: install a newer one");
    }
    return *found;
}

void check(OrtStatus* status) {
    if (status == nullptr) return;
    const std::string message = api().GetErrorMessage(status);
    api().ReleaseStatus(status);
    throw Error("ONNX Runtime: " + message);
}

template <class T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

struct Input {
    std::string name;
    ONNXTensorElementDataType type;
    Shape shape;  // -1 where it varies
    std::vector<std::string> axes;
};

class Session {
  public:
    explicit Session(const fs::path& graph)
        : env_(nullptr, api().ReleaseEnv), session_(nullptr, api().ReleaseSession) {
        OrtEnv* env = nullptr;
        check(api().CreateEnv(ORT_LOGGING_LEVEL_ERROR, "dualdiff", &env));
        env_.reset(env);
        OrtSessionOptions* made = nullptr;
        check(api().CreateSessionOptions(&made));
        const Owned<OrtSessionOptions> options(made, api().ReleaseSessionOptions);
        // by path: the weights are in files next to the graph
        OrtSession* session = nullptr;
        check(api().CreateSession(env, graph.c_str(), options.get(), &session));
        session_.reset(session);
        check(api().GetAllocatorWithDefaultOptions(&allocator_));
    }

    std::vector<Input> inputs() const {
        size_t number = 0;
        check(api().SessionGetInputCount(session_.get(), &number));
        std::vector<Input> found;
        for (size_t i = 0; i < number; ++i) found.push_back(input(i));
        return found;
    }

    // The graph's one output, written to a file; returns its shape.
    Shape run(const std::vector<Input>& inputs, std::vector<Array>& arrays, const fs::path& to) {
        OrtMemoryInfo* made = nullptr;
        check(api().CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &made));
        const Owned<OrtMemoryInfo> memory(made, api().ReleaseMemoryInfo);
        std::vector<Owned<OrtValue>> held;
        std::vector<const char*> names;
        std::vector<const OrtValue*> values;
        for (size_t i = 0; i < inputs.size(); ++i) {
            Array& a = arrays[i];
            OrtValue* value = nullptr;
            // reads the array where it is
            check(api().CreateTensorWithDataAsOrtValue(memory.get(), a.data.data(), a.data.size(),
                                                       a.shape.data(), a.shape.size(), a.kind.type,
                                                       &value));
            held.emplace_back(value, api().ReleaseValue);
            names.push_back(inputs[i].name.c_str());
            values.push_back(value);
        }
        const char* output = "noise";
        OrtValue* noise = nullptr;
        check(api().Run(session_.get(), nullptr, names.data(), values.data(), values.size(),
                        &output, 1, &noise));
        held.emplace_back(noise, api().ReleaseValue);
        return keep(noise, to);
    }

  private:
    Input input(size_t index) const {
        char* name = nullptr;
        check(api().SessionGetInputName(session_.get(), index, allocator_, &name));
        Input found{name, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, {}, {}};
        check(api().AllocatorFree(allocator_, name));
        OrtTypeInfo* made = nullptr;
        check(api().SessionGetInputTypeInfo(session_.get(), index, &made));
        const Owned<OrtTypeInfo> info(made, api().ReleaseTypeInfo);
        const OrtTensorTypeAndShapeInfo* tensor = nullptr;
        check(api().CastTypeInfoToTensorInfo(info.get(), &tensor));
        if (tensor == nullptr) throw Error("input " + found.name + " of the graph is not a tensor");
        check(api().GetTensorElementType(tensor, &found.type));
        size_t rank = 0;
        check(api().GetDimensionsCount(tensor, &rank));
        found.shape.resize(rank);
        check(api().GetDimensions(tensor, found.shape.data(), rank));
        std::vector<const char*> axes(rank);
        check(api().GetSymbolicDimensions(tensor, axes.data(), rank));
        found.axes.assign(axes.begin(), axes.end());
        return found;
    }

    static Shape keep(OrtValue* noise, const fs::path& to) {
        OrtTensorTypeAndShapeInfo* made = nullptr;
        check(api().GetTensorTypeAndShape(noise, &made));
        const Owned<OrtTensorTypeAndShapeInfo> info(made, api().ReleaseTensorTypeAndShapeInfo);
        size_t rank = 0;
        check(api().GetDimensionsCount(info.get(), &rank));
        Shape shape(rank);
        check(api().GetDimensions(info.get(), shape.data(), rank));
        void* data = nullptr;
        check(api().GetTensorMutableData(noise, &data));
        // fp32, whatever precision the graph computes in
        write_npy(to, kinds[0], shape, data);
        return shape;
    }

    Owned<OrtEnv> env_;
    Owned<OrtSession> session_;
    OrtAllocator* allocator_ = nullptr;
};

// ---- the command ----

fs::path denoiser_of(const fs::path& graph) {
    if (!fs::is_directory(graph)) {
        if (!fs::exists(graph)) throw Error("no file " + graph.string());
        return graph;
    }
    for (const char* name : {"denoiser.onnx", "denoiser_background.onnx"}) {
        if (fs::exists(graph / name)) return graph / name;
    }
    throw Error(graph.string() + " has no denoiser graph: create it with `dualdiff export bundle`");
}

Array load(const fs::path& folder, const Input& input) {
    const fs::path path = folder / (input.name + ".npy");
    Array array = read_npy(path);
    bool fits = array.shape.size() == input.shape.size();
    for (size_t i = 0; fits && i < array.shape.size(); ++i) {
        fits = input.shape[i] < 0 ? array.shape[i] > 0 : array.shape[i] == input.shape[i];
    }
    if (!fits) {
        throw Error(path.string() + " has shape " + text(array.shape) + ", but the graph expects " +
                    text(input.shape, input.axes));
    }
    if (array.kind.type != input.type) {
        throw Error(path.string() + " has type " + array.kind.descr +
                    ", but the graph expects another type");
    }
    return array;
}

void step(const fs::path& graph, const fs::path& folder, const fs::path& to) {
    Session session(denoiser_of(graph));
    const std::vector<Input> inputs = session.inputs();
    std::vector<Array> arrays;
    for (const Input& input : inputs) arrays.push_back(load(folder, input));
    const Shape shape = session.run(inputs, arrays, to);
    std::cout << "noise " << text(shape) << " by ONNX Runtime "
              << OrtGetApiBase()->GetVersionString() << "\n";
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 4) {
        std::cerr << "usage: step GRAPH INPUTS NOISE.npy\n"
                     "  GRAPH   a bundle, or a denoiser's .onnx file\n"
                     "  INPUTS  a folder with NAME.npy for every input of the graph\n";
        return 2;
    }
    try {
        step(argv[1], argv[2], argv[3]);
    } catch (const std::exception& error) {
        std::cerr << "step: " << error.what() << "\n";
        return 1;
    }
}
