package bench

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
)

// Machine names the machine, the system and the Go version of the figures.
func Machine() string {
	cpu := runtime.GOARCH
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
				cpu = strings.TrimSpace(v)
				break
			}
		}
	}
	system := runtime.GOOS
	if text, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		release, _, _ := strings.Cut(strings.TrimSpace(string(text)), "-")
		system += " " + release
	}
	return fmt.Sprintf("%s, %d cores, %s/%s, %s", cpu, runtime.NumCPU(), system, runtime.GOARCH, runtime.Version())
}

// Versions names the rivals' versions.
func Versions() string {
	var versions []string
	list := exec.Command("go", "list", "-m", "-f", "{{.Path}} {{.Version}}",
		"github.com/jackc/puddle/v2", "github.com/jolestar/go-commons-pool/v2", "github.com/redis/go-redis/v9")
	text, err := list.Output()
	if err != nil {
		return "versions as in go.mod"
	}
	for line := range strings.Lines(string(text)) {
		path, version, _ := strings.Cut(strings.TrimSpace(line), " ")
		versions = append(versions, strings.Split(path, "/")[2]+" "+version)
	}
	return strings.Join(versions, ", ") + ", database/sql and net/http as in Go"
}
