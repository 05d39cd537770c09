// One prompt in, the answer out as it comes: mlxd from Swift, on macOS, with nothing but Foundation.
// Not compiled in this repository's tests, which have no Swift.
//
//     swiftc -O Process.swift && ./Process "so um hello world"
//
// Speaks JSON lines: one JSON object a line, both ways. The structs' fields are in docs/wire.md.

import Foundation

struct Params: Encodable {
    let prompt: String
    let stream = true
}

struct Request: Encodable {
    let jsonrpc = "2.0"
    let id = 1
    let method = "process"
    let params: Params
}

struct Reply: Decodable {
    struct Piece: Decodable { let text: String? }
    struct Completion: Decodable { let text: String }
    struct Failure: Decodable { let message: String }
    let method: String?
    let params: Piece?
    let result: Completion?
    let error: Failure?
}

func socketPath() -> String {
    let environment = ProcessInfo.processInfo.environment
    if let path = environment["MLXD_SOCKET"] { return path }
    let home = environment["MLXD_HOME"] ?? NSHomeDirectory() + "/Library/Application Support/mlxd"
    return home + "/mlxd.sock"
}

func dial(_ path: String) throws -> FileHandle {
    let descriptor = socket(AF_UNIX, SOCK_STREAM, 0)
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    let limit = MemoryLayout.size(ofValue: address.sun_path)
    guard path.utf8.count < limit else { throw POSIXError(.ENAMETOOLONG) }
    withUnsafeMutablePointer(to: &address.sun_path) { place in
        place.withMemoryRebound(to: CChar.self, capacity: limit) { _ = strlcpy($0, path, limit) }
    }
    let size = socklen_t(MemoryLayout<sockaddr_un>.size)
    let connected = withUnsafePointer(to: &address) { pointer in
        pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { connect(descriptor, $0, size) }
    }
    guard connected == 0 else { throw POSIXError(POSIXErrorCode(rawValue: errno) ?? .EIO) }
    return FileHandle(fileDescriptor: descriptor, closeOnDealloc: true)
}

// quoted: ask
let prompt = CommandLine.arguments.dropFirst().joined(separator: " ")
let connection = try dial(socketPath())
try connection.write(contentsOf: JSONEncoder().encode(Request(params: Params(prompt: prompt))) + Data([10]))
for try await line in connection.bytes.lines {
    let reply = try JSONDecoder().decode(Reply.self, from: Data(line.utf8))
    if let text = reply.params?.text {
        print(text, terminator: "")
        fflush(stdout)
    } else if let failure = reply.error {
        FileHandle.standardError.write(Data("mlxd: \(failure.message)\n".utf8))
        exit(1)
    } else if reply.result != nil {
        print()
        exit(0)
    }
}
// end quoted
