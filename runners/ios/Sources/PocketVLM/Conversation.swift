import CPocketVLM
import Foundation

/// What went wrong, in one line.
public struct Fault: LocalizedError {
    public let errorDescription: String?
}

/// A conversation about pictures with a bundle's ONNX graphs; used by one thread at a time.
///
/// Names and shapes are read from the bundle's manifest.
public final class Conversation {
    private let handle: OpaquePointer

    /// Loads the graphs of a bundle's folder.
    ///
    /// - Parameters:
    ///   - library: ONNX Runtime's library; `nil` where it is linked into the app.
    ///   - threads: Threads of the heavy graphs; 0 for one per physical core.
    public init(bundle: URL, library: URL? = nil, threads: Int32 = 0) throws {
        var reason: UnsafeMutablePointer<CChar>?
        guard let opened = pocketvlm_open(bundle.path, library?.path, threads, &reason) else {
            throw Self.fault(reason)
        }
        handle = opened
    }

    deinit { pocketvlm_close(handle) }

    /// Chooses the vision graph that sees the pictures of later questions, where a bundle has several.
    ///
    /// - Parameters:
    ///   - visualTokens: Tokens of a tile; 0 for the first number that there is.
    ///   - width: Of what the graph takes, with `height`; 0 for the size closest to a picture's
    ///     ratio of sides.
    public func chooseVision(visualTokens: Int32 = 0, width: Int32 = 0, height: Int32 = 0) throws {
        var reason: UnsafeMutablePointer<CChar>?
        guard pocketvlm_choose_vision(handle, visualTokens, width, height, &reason) == 0 else {
            throw Self.fault(reason)
        }
    }

    /// Encodes a picture of the next question before it is asked, as while a user types.
    ///
    /// The question's text has its marker, before those of the pictures that come with `ask`. A
    /// picture that cannot be read changes nothing.
    ///
    /// - Parameter picture: A JPEG or PNG file.
    public func encodeAhead(_ picture: Data) throws {
        var reason: UnsafeMutablePointer<CChar>?
        let status = [UInt8](picture).withUnsafeBufferPointer { memory -> Int32 in
            var shown = pocketvlm_picture(bytes: memory.baseAddress, size: picture.count)
            return pocketvlm_encode_ahead(handle, &shown, &reason)
        }
        guard status == 0 else { throw Self.fault(reason) }
    }

    /// Asks, and returns the answer; after a failure the conversation has started over.
    ///
    /// - Parameters:
    ///   - rendered: The chat template's text of this turn and all before it, with a marker per
    ///     picture and U+F0002 for every earlier answer.
    ///   - pictures: JPEG or PNG files that come with this turn.
    ///   - onPiece: Takes each piece of the answer as soon as it is certain.
    public func ask(
        _ rendered: String,
        pictures: [Data] = [],
        maxNewTokens: Int32 = 64,
        onPiece: @escaping (String) -> Void = { _ in }
    ) throws -> String {
        let listener = Listener(onPiece)
        // One block of memory for all pictures, so that none moves while it is looked at.
        let bytes = pictures.reduce(into: [UInt8]()) { $0 += $1 }
        var reason: UnsafeMutablePointer<CChar>?
        let status = bytes.withUnsafeBufferPointer { memory -> Int32 in
            var start = 0
            let shown = pictures.map { picture -> pocketvlm_picture in
                defer { start += picture.count }
                return pocketvlm_picture(
                    bytes: memory.baseAddress.map { $0 + start }, size: picture.count)
            }
            return pocketvlm_ask(
                handle, rendered, shown, shown.count, maxNewTokens,
                { piece, context in
                    guard let piece, let context else { return }
                    Unmanaged<Listener>.fromOpaque(context).takeUnretainedValue()
                        .take(String(cString: piece))
                },
                Unmanaged.passUnretained(listener).toOpaque(), &reason)
        }
        guard status == 0 else { throw Self.fault(reason) }
        return listener.answer
    }

    /// Forgets every turn; the graphs stay loaded.
    public func reset() { pocketvlm_reset(handle) }

    private static func fault(_ reason: UnsafeMutablePointer<CChar>?) -> Fault {
        defer { pocketvlm_free(reason) }
        return Fault(errorDescription: reason.map { String(cString: $0) } ?? "memory ran out")
    }

    private final class Listener {
        private(set) var answer = ""
        private let onPiece: (String) -> Void

        init(_ onPiece: @escaping (String) -> Void) { self.onPiece = onPiece }

        func take(_ piece: String) {
            answer += piece
            onPiece(piece)
        }
    }
}

/// Does one job of the line protocol and writes its lines to a file descriptor.
///
/// - Returns: The exit status of a runner: 0 with a result, 2 with a reason.
public func runJob(_ job: String, library: URL? = nil, descriptor: Int32 = 1) -> Int32 {
    pocketvlm_run_job(job, library?.path, descriptor)
}
