// kiln-solve is BuildKit's client inside a machine: it stays, so that it is already running, connected and warm in the template that
// machines are cloned from. Without hardware virtualisation the start of a client costs most of a second in every clone.
//
// It listens on a Unix socket. Who connects sends one line of JSON (see request) and reads lines, each with one letter in front:
//
//	s{...}     progress, a SolveStatus of BuildKit as JSON
//	e<words>   the build failed, in one line; the last line
//	d          the build is done; the last line
//
// Closing the connection cancels the build. It decides nothing: what may be reached, read or pushed is decided outside of the machine.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	"github.com/moby/buildkit/session/sshforward/sshprovider"
	"github.com/tonistiigi/fsutil"
)

// Most bytes of one request.
const requestMax = 1 << 20

// What to build. Paths are the machine's own.
type request struct {
	// Options of the Dockerfile frontend.
	Options map[string]string `json:"options"`
	// Folders by the name the frontend asks for: context, dockerfile.
	Folders map[string]string `json:"folders"`
	// Files that hold secrets, by id.
	Secrets map[string]string `json:"secrets"`
	// Sockets of SSH agents, by id.
	SSH map[string]string `json:"ssh"`
	// Attributes of the image to export; nothing is exported without any.
	Image map[string]string `json:"image"`
}

func (r request) solve() (client.SolveOpt, error) {
	opt := client.SolveOpt{
		Frontend:      "dockerfile.v0",
		FrontendAttrs: r.Options,
		LocalMounts:   map[string]fsutil.FS{},
	}
	for name, path := range r.Folders {
		folder, err := fsutil.NewFS(path)
		if err != nil {
			return opt, fmt.Errorf("folder %s: %w", name, err)
		}
		opt.LocalMounts[name] = folder
	}
	if len(r.Secrets) > 0 {
		var sources []secretsprovider.Source
		for id, path := range r.Secrets {
			sources = append(sources, secretsprovider.Source{ID: id, FilePath: path})
		}
		store, err := secretsprovider.NewStore(sources)
		if err != nil {
			return opt, err
		}
		opt.Session = append(opt.Session, secretsprovider.NewSecretProvider(store))
	}
	if len(r.SSH) > 0 {
		var agents []sshprovider.AgentConfig
		for id, path := range r.SSH {
			agents = append(agents, sshprovider.AgentConfig{ID: id, Paths: []string{path}})
		}
		provider, err := sshprovider.NewSSHAgentProvider(agents)
		if err != nil {
			return opt, err
		}
		opt.Session = append(opt.Session, provider)
	}
	if len(r.Image) > 0 {
		opt.Exports = []client.ExportEntry{{Type: client.ExporterImage, Attrs: r.Image}}
	}
	return opt, nil
}

// Builds what the connection asks for.
func serve(buildkit *client.Client, conn net.Conn) {
	defer conn.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	in := bufio.NewReader(io.LimitReader(conn, requestMax))
	line, err := in.ReadBytes('\n')
	if err != nil {
		return
	}
	go func() {
		// Nothing more is said: the next thing to read is the end, and it cancels.
		_, _ = io.Copy(io.Discard, conn)
		cancel()
	}()
	out := bufio.NewWriter(conn)
	err = build(ctx, buildkit, line, out)
	if err != nil {
		fmt.Fprintf(out, "e%s\n", strings.ReplaceAll(err.Error(), "\n", " "))
	} else {
		fmt.Fprint(out, "d\n")
	}
	_ = out.Flush()
}

func build(ctx context.Context, buildkit *client.Client, line []byte, out *bufio.Writer) error {
	var asked request
	if err := json.Unmarshal(line, &asked); err != nil {
		return fmt.Errorf("the request cannot be read: %w", err)
	}
	opt, err := asked.solve()
	if err != nil {
		return err
	}
	progress := make(chan *client.SolveStatus)
	var told sync.WaitGroup
	told.Go(func() {
		for status := range progress {
			text, err := json.Marshal(status)
			if err != nil {
				continue
			}
			// A reader that has gone is noticed by the other side of the connection.
			_ = out.WriteByte('s')
			_, _ = out.Write(text)
			_ = out.WriteByte('\n')
			_ = out.Flush()
		}
	})
	_, err = buildkit.Solve(ctx, nil, opt, progress)
	told.Wait()
	return err
}

func run(buildkitd, listen string) error {
	buildkit, err := client.New(context.Background(), buildkitd)
	if err != nil {
		return err
	}
	if err := os.Remove(listen); err != nil && !os.IsNotExist(err) {
		return err
	}
	door, err := net.Listen("unix", listen)
	if err != nil {
		return err
	}
	if err := os.Chmod(listen, 0o600); err != nil {
		return err
	}
	for {
		conn, err := door.Accept()
		if err != nil {
			return err
		}
		go serve(buildkit, conn)
	}
}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: kiln-solve unix:///BUILDKITD-SOCKET /SOCKET-TO-LISTEN-ON")
		os.Exit(64)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "kiln-solve:", err)
		os.Exit(1)
	}
}
