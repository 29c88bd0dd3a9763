plugins {
    id("com.android.application")
    id("org.jetbrains.kotlin.android")
}

val runtime = "com.microsoft.onnxruntime:onnxruntime-android:1.27.0"

// The headers that the C++ runner is built with are those of the library that it will open.
val headers: Configuration by configurations.creating
val unpackHeaders by tasks.registering(Copy::class) {
    from({ headers.map { zipTree(it) } }) { include("headers/*") }
    into(layout.buildDirectory.dir("onnxruntime"))
}

android {
    namespace = "dev.pocketvlm"
    compileSdk = 36
    defaultConfig {
        applicationId = "dev.pocketvlm"
        minSdk = 26
        targetSdk = 36
        ndk { abiFilters += "arm64-v8a" }
        externalNativeBuild {
            cmake {
                targets += "pocketvlm-jni"
                arguments += listOf(
                    "-DANDROID_STL=c++_shared",
                    "-DCMAKE_FIND_ROOT_PATH=${property("pocketvlm.prefix")}",
                    "-DJSON_INCLUDE_DIR=${property("pocketvlm.json")}",
                    "-DONNXRUNTIME_INCLUDE_DIR=" +
                        layout.buildDirectory.dir("onnxruntime/headers").get().asFile
                )
            }
        }
    }
    externalNativeBuild { cmake { path = file("../../cpp/CMakeLists.txt") } }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
    kotlinOptions { jvmTarget = "17" }
}

tasks.matching { it.name.startsWith("configureCMake") }.configureEach { dependsOn(unpackHeaders) }

dependencies {
    implementation(runtime)
    headers("$runtime@aar")
}
