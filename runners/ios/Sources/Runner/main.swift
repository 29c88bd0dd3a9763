// Does one job of the line protocol, read from `--job FILE` or from standard input.
import Foundation
import PocketVLM

let words = CommandLine.arguments.dropFirst()
let job: Data?
switch (words.count, words.first) {
case (0, _):
    job = FileHandle.standardInput.readDataToEndOfFile()
case (2, "--job"?):
    job = FileManager.default.contents(atPath: words.last!)
default:
    job = nil
}
guard let job, let text = String(data: job, encoding: .utf8) else {
    FileHandle.standardError.write(Data("error: give a readable --job FILE, or a job on standard input\n".utf8))
    exit(2)
}
exit(runJob(text))
