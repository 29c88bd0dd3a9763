// swift-tools-version: 5.9
// The library of runners/cpp for Swift. POCKETVLM_LIBRARIES names the folder of libpocketvlm.a (and
// of what it needs: libjpeg, libpng, ONNX Runtime), built for the platform: docs/native_runners.md.
import Foundation
import PackageDescription

let libraries = ProcessInfo.processInfo.environment["POCKETVLM_LIBRARIES"] ?? "."

let package = Package(
    name: "PocketVLM",
    platforms: [.iOS(.v16), .macOS(.v13)],
    products: [
        .library(name: "PocketVLM", targets: ["PocketVLM"]),
        .executable(name: "pocketvlm-runner", targets: ["Runner"]),
    ],
    targets: [
        .systemLibrary(name: "CPocketVLM"),
        .target(
            name: "PocketVLM",
            dependencies: ["CPocketVLM"],
            linkerSettings: [
                .unsafeFlags(["-L\(libraries)"]),
                .linkedLibrary("pocketvlm"),
                .linkedLibrary("jpeg"),
                .linkedLibrary("png"),
                .linkedLibrary("z"),
                .linkedLibrary("c++"),
            ]
        ),
        .executableTarget(name: "Runner", dependencies: ["PocketVLM"]),
    ]
)
