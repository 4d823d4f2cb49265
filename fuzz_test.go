package connpool

import (
	"io/fs"
	"math/rand/v2"
	"strings"
	"testing"
	"unicode"

	"github.com/stretchr/testify/require"
)

// FuzzParseAddr: whatever parses is canonical and comes back from its own text
// as the same value; whatever does not says so and is no address.
//
// BETA-X02
func FuzzParseAddr(f *testing.F) {
	f.Fuzz(func(t *testing.T, s string) {
		a, err := ParseAddr(s)
		if err != nil {
			require.Zero(t, a)
			require.ErrorIs(t, err, fs.ErrInvalid)
			require.True(t, strings.HasPrefix(err.Error(), "connpool: ParseAddr("), err.Error())
			if len(s) > 0 {
				require.Error(t, new(Addr).UnmarshalText([]byte(s)))
			}
			return
		}
		canon, err := a.canonical()
		require.NoError(t, err)
		require.Equal(t, a, canon)

		text := a.String()
		requirePrintable(t, text)
		back, err := ParseAddr(text)
		require.NoError(t, err)
		require.Equal(t, a, back)
		require.Zero(t, a.Compare(back))
		require.Equal(t, text, back.String())

		marshaled, err := a.MarshalText()
		require.NoError(t, err)
		require.Equal(t, text, string(marshaled))
		var u Addr
		require.NoError(t, u.UnmarshalText(marshaled))
		require.Equal(t, a, u)
	})
}

// FuzzNetAddr: whatever is an address of package net for NetAddr is canonical and comes
// back from its HostPort as the same value; whatever is not says so in one line.
//
// ADO-04
func FuzzNetAddr(f *testing.F) {
	for _, seed := range []struct{ network, address string }{
		{"tcp", "db.example:5432"}, {"tcp", "localhost:http"}, {"tcp", ":80"}, {"tcp", "[::1]:80"}, {"tcp", "a:b@c:80"},
		{"tcp4", "10.0.0.1:080"}, {"tcp6", "[fe80::1%25]:+5"}, {"tcp6", "[::ffff:10.0.0.1%x]:1"},
		{"unix", "/run/x.sock"}, {"unix", "@x"}, {"unix", "\x00"}, {"udp", "10.0.0.1:53"},
	} {
		f.Add(seed.network, seed.address)
	}
	f.Fuzz(func(t *testing.T, network, address string) {
		a, err := NetAddr(network, address)
		if err != nil {
			require.Zero(t, a)
			require.ErrorIs(t, err, fs.ErrInvalid)
			require.False(t, strings.ContainsFunc(err.Error(), unicode.IsControl), "%q", err)
			return
		}
		canon, err := a.canonical()
		require.NoError(t, err)
		require.Equal(t, a, canon)
		for _, again := range []string{network, string(a.Transport)} {
			back, err := NetAddr(again, a.HostPort())
			require.NoError(t, err)
			require.Equal(t, a, back)
		}
		text, err := ParseAddr(a.String())
		require.NoError(t, err)
		require.Equal(t, a, text)
	})
}

// FuzzPoolOps runs the input as a program of the state-machine test.
func FuzzPoolOps(f *testing.F) {
	f.Add([]byte("borrow, give back, and so on"))
	for seed := range byte(8) {
		program := make([]byte, 600)
		rand.NewChaCha8([32]byte{seed, 7}).Read(program)
		f.Add(program)
	}
	f.Fuzz(func(t *testing.T, program []byte) {
		if err := runProgram(t, program, 2000); err != nil {
			t.Fatal(err)
		}
	})
}
